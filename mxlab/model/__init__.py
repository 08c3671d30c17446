"""A recipe laid onto a network: what can be quantized in it, what is, and how its modules compute then.

Read in this order: ``sites`` (where in a model something can be quantized), ``plan`` (which rule each site comes
under), ``apply`` (plan, install, freeze), ``conversion`` (what was done), ``observe`` (watching operands), ``nn`` (the
modules).
"""
