"""Words are found however they are written."""

from __future__ import annotations

import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from memopt.memory.memory_store import MemoryStore
from memopt.memory.model.schema import Content, NewMemory
from memopt.memory.model.words import query_words, words

OLD = Path(__file__).parents[2] / "data" / "v0.1" / "store.tar.xz"


@pytest.mark.parametrize(
    ("asked", "written"),
    [
        ("Köln", unicodedata.normalize("NFD", "Köln am Rhein")),
        (unicodedata.normalize("NFD", "Köln"), "Köln am Rhein"),
        ("resume", "her résumé"),
        ("won't", "it won’t start"),
        ("D'Angelo", "ask D‘Angelo"),
        ("مدرسه", "مَدْرَسه"),
        ("ספר", "סֵפֶר ישן"),
        ("module", "import pkg_tools.module"),
        ("izmir", "İzmir by night"),
        ("ISPARTA", "ısparta"),
        ("🚲", "the 🚲 is blue"),
        ("ＡＢＣ", "abc"),
        ("straße", "STRASSE"),
        ("猫", "隣の猫が鳴く"),
        ("학교", "학교에 갔다"),
        ("bicycles", "a bicycle"),
        ("soft", "so\u00adft"),
    ],
)
def test_one_form_is_shared(asked: str, written: str) -> None:
    """What a reader sees as the same word has the same form."""
    assert set(words(asked)) <= set(words(written))


@pytest.mark.parametrize(("one", "other"), [("कि", "की"), ("がく", "かく"), ("news", "paper")])
def test_other_words_stay_other(one: str, other: str) -> None:
    """Signs that make another word are kept."""
    assert words(one) != words(other)


@pytest.mark.parametrize(
    ("question", "kept"),
    [
        ("What did Ann buy in Rome?", ["ann", "buy", "rom"]),
        ("Wann war Ida in Rom?", ["ida", "rom"]),
        ("to be or not to be", ["to", "be", "or", "not"]),
    ],
)
def test_a_question_is_what_it_asks_for(question: str, kept: list[str]) -> None:
    """Function words of its language are left out, unless there are no others."""
    assert query_words(question) == kept


def test_a_store_finds_them_before_and_after_a_merge(tmp_path: Path) -> None:
    """Rows that the index does not know yet too, and after an update."""
    with MemoryStore(tmp_path / "s", dim=2, background=False) as store:
        text = unicodedata.normalize("NFD", "Köln: O’Neill’s 🚲")
        new = NewMemory(content=Content(text=text), embedding=np.array([1.0, 0]), memory_id="a")
        store.add(new)
        for _ in range(2):
            for word in ("köln", "O'Neill", "🚲"):
                assert [hit.memory.memory_id for hit in store.search(text=word)] == ["a"]
            store.optimize()
        store.update("a", text="a train", joint_embedding=np.array([1.0, 0]))
        assert [hit.memory.text for hit in store.search(text="trains")] == ["a train"]
        assert store.search(text="köln") == []
        assert store.search(text="?!") == []


def test_a_store_of_before_gets_its_words(tmp_path: Path) -> None:
    """Once, when it is opened; its texts, archived ones too, are found by them."""
    with tarfile.open(OLD) as archive:
        archive.extractall(tmp_path, filter="data")
    for _ in range(2):
        with MemoryStore(tmp_path / "store", background=False) as store:
            assert store.cells.has_words
            assert store.cells.word_columns == ("words",)
            texts = [hit.memory.text for hit in store.search(text="bicycles")]
            assert texts == ["the blue bicycle belongs to Omar"]
