"""The errors mxlab raises on bad input.

Each names the thing that is wrong, the place it was found and the remedy; the command line prints the message
alone, without a traceback, and exits with 2.
"""


class MxlabError(Exception):
    """Anything the user can put right."""


class FormatError(MxlabError, ValueError):
    """A number format, block size or scale that does not exist or does not fit."""


class SpecError(MxlabError, ValueError):
    """MX options (``MX_SPECS_JSON``, the command line, a recipe or a sweep file) that cannot be read."""


class ConversionError(MxlabError):
    """A model that cannot be converted: nothing matched, or it was converted before."""


class CompatError(MxlabError, ImportError):
    """A package whose place mxlab cannot take, or a part of it that mxlab does not have."""


class SourceError(MxlabError):
    """A model or a data set that is not where it was looked for."""


class MetricError(MxlabError, ValueError):
    """Logits or a text that cannot be scored."""


class PatchError(MxlabError):
    """The patch of transformers cannot be put in place or taken back."""


class RunError(MxlabError):
    """A run that did not do what it was asked to do."""


class ReportError(MxlabError):
    """A results folder that cannot be reported on."""
