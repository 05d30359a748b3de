"""export.py's parts: sources -> architectures -> rewrite -> writer, with weights (types) and tokenizer beside them."""
