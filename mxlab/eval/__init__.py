"""One evaluation: a model under a recipe, scored on tasks or on a text.

Read in this order: ``metrics`` (from logits), ``windows`` (of a long text), ``scorer`` (a model under many recipes on
the same tokens), ``request`` (what to evaluate, and what comes of it), ``tasks`` (lm-eval), ``text`` (perplexity).
"""
