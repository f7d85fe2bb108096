"""The runner of the documentation's snippets reports what does not work."""

import pytest

from tests.docs.snippets import Page, read_blocks, split_commands


def run(text, directory, monkeypatch):
    monkeypatch.chdir(directory)
    path = directory / "page.md"
    path.write_text(text)
    return Page(path, directory).run()


@pytest.mark.parametrize(
    ("language", "text", "error"),
    [
        ("python", "1 / 0", ZeroDivisionError),
        ("python", "engine.initialize(config={}, model=model)", ValueError),
        ("json", '{ "gradient_cliping": 1.0 }', AssertionError),
        ("json", '{ "gradient_clipping": }', ValueError),
        ("console", "$ onecycle validate missing.json", AssertionError),
        ("console", "$ onecycle validate ds_config.json\n2 errors", AssertionError),
        ("console", "$ unknown", AssertionError),
        ("bash", "if", Exception),
    ],
)
def test_snippet_that_fails_is_reported_with_its_line(language, text, error, tmp_path, monkeypatch):
    with pytest.raises(error) as caught:
        run(f"# A page\n\n```{language}\n{text}\n```\n", tmp_path, monkeypatch)
    assert "page.md:3" in caught.value.__notes__[-1]


def test_blocks_of_a_page_share_their_config_files_and_names(tmp_path, monkeypatch):
    page = """
```json
{ "optimizer": { "type": "SGD", "params": { "lr": 0.5 } } }
```

- In a list:

  ```python title="my_module.py"
  VALUE = 3
  ```

```python
import my_module

trainer, *_ = engine.initialize(config="ds_config.json", model=model)
```

```python
assert (trainer.get_lr(), my_module.VALUE) == ([0.5], 3)
```
"""
    monkeypatch.syspath_prepend(tmp_path)
    assert run(page, tmp_path, monkeypatch) == 4


def test_read_blocks_finds_languages_titles_and_lines(tmp_path):
    path = tmp_path / "page.md"
    path.write_text('text\n\n  ```json title="a.json"\n  {\n    "a": 1\n  }\n  ```\n')
    assert read_blocks(path) == [("json", "a.json", '{\n  "a": 1\n}\n', 3)]


def test_split_commands_joins_continued_lines():
    text = "$ onecycle a \\\n    b\noutput\n…\n$ onecycle c\n"
    assert split_commands(text) == [["onecycle a      b", "output"], ["onecycle c"]]
