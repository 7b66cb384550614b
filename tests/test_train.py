from collections.abc import Callable
from pathlib import Path

from conftest import Ran


def test_train_smoke(cli: Callable[..., Ran], run_config: Callable[..., Path], tmp_path: Path) -> None:
    ran = cli("train", run_config())
    assert ran.code == 0, ran.err
    print(ran.out, ran.err)
    for args in (("generate","--adapter",tmp_path/"out","3 and 3 make"),("evaluate","--adapter",tmp_path/"out","--data",tmp_path/"rows.jsonl","--json")):
        ran = cli(*args)
        print(ran)
    assert 0
