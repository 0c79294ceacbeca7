"""Reading texts from files, for every command. No torch and no llm-foundry here.

`formats` finds the format of a path and opens it, `rows` reads its rows, and `tokenizer` loads a
tokenizer.
"""
