"""The formats beside microscaling: examples of each, and a strategy that draws any."""

from hypothesis import strategies as st

from mxlab.formats import (
    Binary,
    BlockFP,
    BlockLog,
    BlockMinifloat,
    Integer,
    Log,
    MinifloatDenorm,
    MinifloatIEEE,
    ResidualBinary,
    Ternary,
)

# Spelling: the format, its canonical text, bits per element, block size, bits of a [3, 40] tensor.
SPELLED = [
    (Integer(8, 4), "integer,width=8,frac=4", 8, 1, 960),
    (Integer(2, -3), "integer,width=2,frac=-3", 2, 1, 240),
    (MinifloatDenorm(8, 4), "minifloat_denorm,width=8,exponent_bits=4", 8, 1, 960),
    (MinifloatDenorm(6, 3, 5), "minifloat_denorm,width=6,exponent_bits=3,bias=5", 6, 1, 720),
    (MinifloatIEEE(8, 4), "minifloat_ieee,width=8,exponent_bits=4", 8, 1, 960),
    (MinifloatIEEE(32, 4), "minifloat_ieee,width=32,exponent_bits=4", 32, 1, 3840),
    (Log(4), "log,width=4", 4, 1, 480),
    (Log(4, 7), "log,width=4,bias=7", 4, 1, 480),
    (BlockFP(8), "block_fp@32,width=8", 8.25, 32, 960 + 3 * 2 * 8),
    (BlockFP(4, 5, 20, 16), "block_fp@16,width=4,exponent_bits=5,bias=20", 4.3125, 16, 480 + 3 * 3 * 5),
    (BlockMinifloat(8, 4, block_size=16), "block_minifloat@16,width=8,exponent_bits=4", 8.5, 16, 960 + 3 * 3 * 8),
    (BlockMinifloat(4, 2, 5, 0), "block_minifloat@0,width=4,exponent_bits=2,bias_bits=5", 4, 0, 480 + 3 * 5),
    (BlockLog(4, 4, 8), "block_log@8,width=4,bias_bits=4", 4.5, 8, 480 + 3 * 5 * 4),
    (Binary(), "binary", 1, 1, 120),
    (Binary(stochastic=True), "binary,stochastic=true", 1, 1, 120),
    (Binary(True, True), "binary,scaled=true,stochastic=true", 1, 0, 120 + 3 * 32),
    (ResidualBinary(), "binary_residual", 2, 0, 240 + 3 * 2 * 32),
    (ResidualBinary(3), "binary_residual,levels=3", 3, 0, 360 + 3 * 3 * 32),
    (Ternary(), "ternary", 2, 0, 240 + 3 * 32),
]


parameters = {
    Integer: st.builds(Integer, st.integers(2, 32), st.integers(-64, 64)),
    MinifloatDenorm: st.integers(3, 32).flatmap(
        lambda w: st.builds(
            MinifloatDenorm, st.just(w), st.integers(1, min(w - 2, 8)), st.none() | st.integers(-128, 127)
        )
    ),
    MinifloatIEEE: st.integers(2, 32).flatmap(
        lambda w: st.builds(
            MinifloatIEEE, st.just(w), st.integers(1, min(w - 1, 8)), st.none() | st.integers(-128, 127)
        )
    ),
    Log: st.builds(Log, st.integers(2, 32), st.none() | st.integers(-128, 127)),
    BlockFP: st.builds(
        BlockFP, st.integers(2, 32), st.integers(1, 8), st.none() | st.integers(-128, 127), st.integers(0, 2**40)
    ),
    BlockMinifloat: st.integers(2, 32).flatmap(
        lambda w: st.builds(
            BlockMinifloat, st.just(w), st.integers(1, min(w - 1, 8)), st.integers(1, 8), st.integers(0, 99)
        )
    ),
    BlockLog: st.builds(BlockLog, st.integers(2, 32), st.integers(1, 8), st.integers(0, 2**40)),
    Binary: st.builds(Binary, st.booleans(), st.booleans()),
    ResidualBinary: st.builds(ResidualBinary, st.integers(1, 3)),
    Ternary: st.just(Ternary()),
}
every_family = st.one_of(*parameters.values())
