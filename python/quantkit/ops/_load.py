"""Opens the compiled op libraries and remembers why one could not be opened."""


def load_libraries() -> None: ...
