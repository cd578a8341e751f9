from tests.data.conftest import corpus, tokenizer, tokenizer_path  # noqa: F401
