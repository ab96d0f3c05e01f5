"""A store in a forked process: threads and locks stayed behind, so it says so and never waits."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")

# A process of its own: what pytest has loaded is nothing to fork.
_MAIN = (
    "import sys; from tests.memory.store import test_fork as t; "
    "getattr(t, sys.argv[1])(sys.argv[2])"
)
_WAIT = 60.0


def run(name: str, folder: Path) -> Any:
    """Call a function of this module in a new process; return what it printed as JSON."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _MAIN, name, str(folder)],
        env=os.environ,
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=4 * _WAIT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def in_fork(ask: Callable[[], object]) -> str:
    """Call in an os.fork() child; return its answer, its error or that it hung."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = str(ask())
        except BaseException as error:  # noqa: BLE001 - the parent looks at it
            answer = f"{type(error).__name__}: {error}"
        os.write(write, answer.encode())
        os._exit(0)
    os.close(write)
    return _answer(read, child)


def _answer(read: int, child: int) -> str:
    import select

    there, _, _ = select.select([read], [], [], _WAIT)
    answer = os.read(read, 1 << 16).decode() if there else "hung"
    if not there:
        os.kill(child, 9)
    os.close(read)
    os.waitpid(child, 0)
    return answer


def _filled(folder: str) -> Any:
    from memopt.memory.session import open_memory
    from tests.memory.kit import Hashing, note

    session = open_memory(folder, embedder=Hashing(), background=True)
    memory = session.__enter__()
    memory.store.add([note(f"n {at}") for at in range(20)])
    memory.retriever.retrieve("n 1", top_k=2)
    return memory


def every_door(folder: str) -> None:
    """Each use of a store of before the fork; then the parent's own."""
    from memopt.memory.model.schema import Content
    from tests.memory.kit import note

    memory = _filled(folder)
    store = memory.store
    asks: dict[str, Callable[[], object]] = {
        "find": lambda: store.find(Content(text="n 1")),
        "retrieve": lambda: memory.retriever.retrieve("n 1"),
        "get": lambda: store.get("n-1"),
        "add": lambda: store.add(note("of the child")),
        "update": lambda: store.update("n-1", category="c"),
        "delete": lambda: store.delete(["n-1"]),
        "scan": lambda: list(store.scan()),
        "count": lambda: store.count(),
        "touch": lambda: store.touch(["n-1"]),
        "flush": lambda: store.find(Content(text="n 1")) and store.flush(),
        "optimize": lambda: store.optimize(),
        "event": lambda: store.event("a", "b"),
        "ensure": lambda: store.index.ensure(),
    }
    answers = {name: in_fork(ask) for name, ask in asks.items()}
    # Not an error: a with block that ends in the child, and what it would write is the parent's.
    answers["close"] = in_fork(store.close)
    answers["log"] = in_fork(memory.log.close)
    store.add(note("of the parent"))
    store.close()
    answers["parent"] = str((store.count(), store.get("n-1").category))
    print(json.dumps(answers))


def opened_again(folder: str) -> None:
    """A store that children open themselves, by os.fork and by multiprocessing."""
    # The children of a process that has opened no store yet.
    answers = [in_fork(lambda: _work(folder, "os"))]
    context = multiprocessing.get_context("fork")
    with context.Pool(1) as pool:
        answers.append(pool.apply_async(_work, (folder, "pool")).get(timeout=_WAIT))
    memory = _filled(folder)
    answers.append(in_fork(lambda: _work(folder, "late")))
    with context.Pool(1) as pool:
        try:
            pool.apply_async(_work, (folder, "late")).get(timeout=_WAIT)
        except Exception as error:  # noqa: BLE001 - the test looks at it
            answers.append(f"{type(error).__name__}: {error}")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        answers.append(pool.apply_async(_work, (folder, "spawned")).get(timeout=_WAIT))
    print(json.dumps([answers, memory.store.count()]))
    memory.store.close()


def _work(folder: str, name: str) -> str:
    from memopt.memory.memory_store import MemoryStore
    from memopt.memory.model.schema import Content
    from tests.memory.kit import Hashing, note

    with MemoryStore(folder, embedder=Hashing()) as store:
        added = store.add(note(f"of {name}")).added
        return f"{added} {store.find(Content(text=f'of {name}'))[0].memory.text}"


def forked_while_locked(folder: str) -> None:
    """Another thread writes and one reads while the child is made, which then lives on."""
    from memopt.memory.store.locking import lock_of, reading, unless_read
    from tests.memory.kit import note

    memory = _filled(folder)
    path = Path(folder)
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with lock_of(path).held(), reading(path):
            held.set()
            done.wait(_WAIT)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(_WAIT)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(write)
        os.read(read, 1)  # until the parent is done
        os._exit(0)
    done.set()
    thread.join()
    # The child has copies of both descriptors; neither lock is held any longer.
    added = memory.store.add(note("of the parent")).added
    with unless_read(path) as unread:
        answers = [added, unread]
    memory.store.close()
    os.close(write)
    os.waitpid(child, 0)
    print(json.dumps([*answers, memory.store.count()]))


def forked_inside(folder: str) -> None:
    """A child made inside the lock by the thread that holds it gives nothing of the parent back."""
    from memopt.memory.store.locking import WriterLock, lock_of

    lock = lock_of(Path(folder))
    Path(folder).mkdir()
    child = -1
    read, write = os.pipe()
    with lock.held():
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            os.close(write)
            answer = os.read(read, 100).decode()
            other = in_fork(lambda: WriterLock(Path(folder), patience=0.1).held().__enter__())
    if child == 0:
        os.write(write, b"left the block")
        os._exit(0)
    print(json.dumps([answer, other.partition(":")[0]]))


def test_a_store_of_before_the_fork_says_so(tmp_path: Path) -> None:
    """One line by every door; closing is quiet and writes nothing of the parent's twice."""
    answers = run("every_door", tmp_path / "s")
    quiet = {name: answers.pop(name) for name in ("close", "log", "parent")}
    assert quiet == {"close": "None", "log": "None", "parent": "(21, '')"}
    for name, answer in answers.items():
        assert answer.startswith("ConsolidationError: "), (name, answer)
        assert "was opened before this process was forked; start processes by 'spawn'" in answer


def test_a_child_opens_its_own(tmp_path: Path) -> None:
    """Where its parent had none open, or by spawn; else one line, since LanceDB may hang there."""
    answers, count = run("opened_again", tmp_path / "s")
    early, late, spawned = answers[:2], answers[2:4], answers[4]
    assert [*early, spawned] == ["1 of os", "1 of pool", "1 of spawned"]
    for answer in late:
        assert answer.startswith("ConsolidationError: lancedb")
        assert "start processes by 'spawn'" in answer
    assert count == 23


def test_a_child_keeps_no_lock_of_the_parent(tmp_path: Path) -> None:
    """What another thread held at the fork is free when that thread lets go."""
    assert run("forked_while_locked", tmp_path / "s") == [1, True, 21]


def test_a_child_made_inside_the_lock_frees_nothing(tmp_path: Path) -> None:
    """It leaves the block, and the parent still holds the lock."""
    assert run("forked_inside", tmp_path / "s") == ["left the block", "ConsolidationError"]
