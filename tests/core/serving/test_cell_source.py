"""What a %%serve cell must hold."""

from __future__ import annotations

import pytest

from jupyter_llmcloud.core.serving.models.cell_source import CellSource, check_source
from jupyter_llmcloud.errors import UsageError

GOOD = "def load(): ...\ndef predict(inputs): return inputs\n"


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        GOOD + "async def stream(inputs):\n    yield 1\n",
        "from m import load, predict",
        "import m\nload = m.load\npredict = lambda x: x",
        "def load(path='a'): ...\ndef predict(inputs, model): ...",
        "def load(): ...\ndef predict(x, y): ...",
        "def load(): ...\ndef predict(model, x=None): ...",
        "if True:\n    def load(): ...\n    def predict(*inputs): ...",
        "async def load(): ...\nasync def predict(inputs): ...",
    ],
)
def test_a_cell_that_can_be_served(text: str) -> None:
    check_source(CellSource(text))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "Cell In[4] defines no load() and predict()"),
        ("def load(): ...", "defines no predict()"),
        ("class A:\n    def load(self): ...\n    def predict(self, x): ...", "defines no load() and predict()"),
        ("def load(x): ...\ndef predict(inputs): ...", "Cell In[4], line 2: load is called with no arguments"),
        ("def load(): ...\ndef predict(): ...", "line 3: predict is called with the inputs"),
        ("def load(): ...\ndef predict(a, b, c): ...", "line 3: predict is called with the inputs"),
        ("def load(): ...\ndef predict(inputs, *, k): ...", "line 3: predict is called"),
        (
            "def load(): ...\ndef predict(model, X): ...",
            "line 3: predict gets the inputs first, then what load() returned: write predict(X, model)",
        ),
        (GOOD + "x = (", "Cell In[4], line 4: SyntaxError"),
        (GOOD + "%matplotlib inline", "line 4: SyntaxError: invalid syntax: %matplotlib inline Magics and shell"),
        ("\0", "is not Python"),
    ],
)
def test_a_cell_that_cannot_is_refused_with_its_line(text: str, words: str) -> None:
    with pytest.raises(UsageError) as error:
        check_source(CellSource(text, "Cell In[4]", 2))
    assert words in str(error.value)
