"""Our models behind the interfaces of others: transformers and lm-eval, which need not be there."""
