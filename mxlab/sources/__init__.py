"""Where models, tasks and texts come from, and which device a model goes to.

Read in this order: ``models`` (by hub name, folder, or the embedded one), ``model_pool`` (copies of the last one),
``devices`` (where it goes, what memory there is), ``tasks`` (lm-eval's, with local data), ``texts`` (for perplexity and
calibration), ``download_cache`` (what mxlab can make again).
"""
