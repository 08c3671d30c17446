"""The report of the published results tree against the tables of the published report, to the printed digit."""

import json
import shutil

import pytest

from mxlab.report import write_report

from support.paths import SHARED

PUBLISHED = SHARED / "data" / "published" / "colab_results"

pytestmark = pytest.mark.skipif(not PUBLISHED.is_dir(), reason=f"the published results are not at {PUBLISHED}")

HEADLINE = """\
| Baseline | 0.622356 ± 0.006754 | 5.428514 ± 0.128561 | 492.293 | 10.467 | Full eval
| Ex1 best (accuracy) | 0.537745 ± 0.006946 | 8.385442 ± 0.228826 | 879.974 | 5.856 | Full eval; bs=16, sb=6, custom_cuda=false
| Ex1 best (speed) | 0.516398 ± 0.006962 | 9.158226 ± 0.260625 | 485.907 | 10.605 | Full eval; bs=16, sb=8, custom_cuda=true
| Ex2 best (accuracy, limited) | 0.282389 ± 0.012543 | 69.508932 ± 6.364539 | 248.117 | 5.195 | limited eval (`n=1289`)
| Ex2 best (speed, limited) | 0.232739 ± 0.011775 | 116.807703 ± 11.175438 | 145.411 | 8.865 | limited eval (`n=1289`)
"""  # noqa: E501

EX1 = """\
| block_size | scale_bits | custom_cuda | acc (±stderr) | ppl (±stderr) | eval_time_s | examples/sec | run_id |
|---:|---:|:---:|---:|---:|---:|---:|---|
| 16 | 6 | false | 0.537745 ± 0.006946 | 8.385442 ± 0.228826 | 879.974 | 5.856 | 20260207_220640_bs16_sb6_ccfalse |
| 16 | 6 | true | 0.516398 ± 0.006962 | 9.158226 ± 0.260625 | 496.202 | 10.385 | 20260207_215813_bs16_sb6_cctrue |
| 16 | 8 | false | 0.537745 ± 0.006946 | 8.385442 ± 0.228826 | 913.943 | 5.638 | 20260207_214248_bs16_sb8_ccfalse |
| 16 | 8 | true | 0.516398 ± 0.006962 | 9.158226 ± 0.260625 | 485.907 | 10.605 | 20260207_213432_bs16_sb8_cctrue |
| 32 | 6 | false | 0.528624 ± 0.006955 | 8.922927 ± 0.246838 | 877.746 | 5.871 | 20260207_225322_bs32_sb6_ccfalse |
| 32 | 6 | true | 0.510188 ± 0.006965 | 9.417524 ± 0.268060 | 496.626 | 10.376 | 20260207_224452_bs32_sb6_cctrue |
| 32 | 8 | false | 0.528624 ± 0.006955 | 8.922927 ± 0.246838 | 879.885 | 5.856 | 20260207_223000_bs32_sb8_ccfalse |
| 32 | 8 | true | 0.510188 ± 0.006965 | 9.417524 ± 0.268060 | 496.597 | 10.377 | 20260207_222132_bs32_sb8_cctrue |
| 64 | 6 | false | 0.516398 ± 0.006962 | 9.236667 ± 0.256585 | 866.146 | 5.949 | 20260207_234020_bs64_sb6_ccfalse |
| 64 | 6 | true | 0.510576 ± 0.006964 | 9.501932 ± 0.270881 | 514.174 | 10.022 | 20260207_233135_bs64_sb6_cctrue |
| 64 | 8 | false | 0.516398 ± 0.006962 | 9.236667 ± 0.256585 | 866.753 | 5.945 | 20260207_231658_bs64_sb8_ccfalse |
| 64 | 8 | true | 0.510576 ± 0.006964 | 9.501932 ± 0.270881 | 518.683 | 9.935 | 20260207_230810_bs64_sb8_cctrue |

"""

EX2 = """\
| block_size | scale_bits | custom_cuda | acc (±stderr) | ppl (±stderr) | eval_time_s | examples/sec | run_id |
|---:|---:|:---:|---:|---:|---:|---:|---|
| 16 | 6 | false | 0.282389 ± 0.012543 | 69.508932 ± 6.364539 | 248.117 | 5.195 | 20260208_014818_bs16_sb6_ccfalse |
| 16 | 6 | true | 0.249030 ± 0.012050 | 98.970079 ± 9.549647 | 145.857 | 8.837 | 20260208_014540_bs16_sb6_cctrue |
| 16 | 8 | false | 0.282389 ± 0.012543 | 69.508932 ± 6.364539 | 248.341 | 5.190 | 20260208_014121_bs16_sb8_ccfalse |
| 16 | 8 | true | 0.249030 ± 0.012050 | 98.970079 ± 9.549647 | 147.716 | 8.726 | 20260208_013843_bs16_sb8_cctrue |
| 32 | 6 | false | 0.235066 ± 0.011815 | 100.705567 ± 9.020378 | 248.512 | 5.187 | 20260208_020214_bs32_sb6_ccfalse |
| 32 | 6 | true | 0.232739 ± 0.011775 | 116.807703 ± 11.175438 | 145.411 | 8.865 | 20260208_015936_bs32_sb6_cctrue |
| 32 | 8 | false | 0.235066 ± 0.011815 | 100.705567 ± 9.020378 | 248.882 | 5.179 | 20260208_015516_bs32_sb8_ccfalse |
| 32 | 8 | true | 0.232739 ± 0.011775 | 116.807703 ± 11.175438 | 146.060 | 8.825 | 20260208_015237_bs32_sb8_cctrue |
| 64 | 6 | false | 0.203258 ± 0.011213 | 146.498735 ± 13.581078 | 244.696 | 5.268 | 20260208_021615_bs64_sb6_ccfalse |
| 64 | 6 | true | 0.205586 ± 0.011261 | 165.580297 ± 15.863741 | 154.085 | 8.366 | 20260208_021332_bs64_sb6_cctrue |
| 64 | 8 | false | 0.203258 ± 0.011213 | 146.498735 ± 13.581078 | 244.419 | 5.274 | 20260208_020917_bs64_sb8_ccfalse |
| 64 | 8 | true | 0.205586 ± 0.011261 | 165.580297 ± 15.863741 | 154.078 | 8.366 | 20260208_020633_bs64_sb8_cctrue |

"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("published")
    write_report(PUBLISHED, out)
    return (out / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("row", HEADLINE.splitlines())
def test_every_row_of_table_1(report, row):
    assert any(line.startswith(row) for line in report.splitlines())


@pytest.mark.parametrize(
    ("title", "table"),
    [("Table 2.1: Exercise 1 sweep results", EX1), ("Table 2.2: Exercise 2 sweep results", EX2)],
    ids=["ex1", "ex2"],
)
def test_sweep_tables_row_by_row(report, title, table):
    assert f"**{title}**\n\n{table}" in report


def test_the_run_without_a_configuration_has_its_own_table(report):
    row = "| ex1 | 0.510188 ± 0.006965 | 9.417524 ± 0.268060 | 600.870 | 8.576 | 5153 | default |"
    assert f"{row}\n\n## Comparability" in report


def test_ex2_is_marked_as_not_comparable(report):
    assert "Ex1, all 13 runs: comparable with the baseline in speed and accuracy." in report
    assert (
        "Ex2, all 12 runs: speed and accuracy not comparable with the baseline (n): n 1289 instead of 5153." in report
    )
    assert "bs=32, sb=6, custom_cuda=true; speed and accuracy not comparable with the baseline (n) |" in report


@pytest.mark.parametrize("stage", ["Ex1", "Ex2"])
@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("custom_cuda", ["true", "false"])
def test_scale_bits_make_no_difference(report, stage, block_size, custom_cuda):
    subject = f"{stage}: scale_bits 6 and 8 give identical numbers for block_size {block_size}"
    assert f"{subject}, custom_cuda={custom_cuda}" in report


def test_the_aborted_run_is_listed(report):
    folder = "content/results/ex1/20260207_213059_bs16_sb8_cctrue"
    assert f"- `{folder}`: no `metrics_*.json`; it holds command.txt, env.txt." in report


def test_changed_numbers_change_the_report(tmp_path):
    tree = tmp_path / "tree"
    shutil.copytree(PUBLISHED, tree, copy_function=shutil.copyfile)
    for folder in (tree, *(path for path in tree.rglob("*") if path.is_dir())):
        folder.chmod(0o755)
    (metrics,) = tree.glob("content/results/ex1/*_bs64_sb8_ccfalse/metrics_*.json")
    record = json.loads(metrics.read_text(encoding="utf-8"))
    record["results"]["lambada_openai"]["acc,none"] = 0.6123456
    record["total_evaluation_time_seconds"] = "400.5"
    metrics.write_text(json.dumps(record), encoding="utf-8")
    write_report(tree, tmp_path / "out")
    report = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    measures = "0.612346 ± 0.006962 | 9.236667 ± 0.256585 | 400.500 | 12.866"
    assert f"| Ex1 best (accuracy) | {measures} | Full eval; bs=64, sb=8, custom_cuda=false |" in report
    assert f"| Ex1 best (speed) | {measures} | Full eval; bs=64, sb=8, custom_cuda=false |" in report
    assert f"| 64 | 8 | false | {measures} | 20260207_231658_bs64_sb8_ccfalse |" in report
    assert "identical numbers for block_size 64, custom_cuda=false (acc 0.516398" not in report
