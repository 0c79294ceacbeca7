"""Reading texts from files, for every command. No torch and no llm-foundry here.

`formats` says what a path is and opens it, `rows` reads its rows, `tokenizer` loads a tokenizer.
"""
