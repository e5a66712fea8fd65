"""A program of torch.export is a network by itself, and nothing that it holds is run."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

import dmformer
from dmformer.errors import UsageError
from dmformer.models.checkpoint import load_checkpoint
from dmformer.models.own import load_own
from dmformer.models.program import is_program, load_program
from tests.bundles import one_line

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore:.*isinstance.treespec:FutureWarning")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        batch, dim, height, width = x.shape
        y = self.act(self.norm(self.conv(x))).flatten(2).transpose(1, 2)
        return x + y.transpose(1, 2).reshape(batch, dim, height, width)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 8, 4, 4), nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return {"logits": self.head(x.mean((2, 3))), "map": x}


def network() -> Network:
    torch.manual_seed(3)
    return Network().eval()


def saved(path: Path, model: nn.Module, *shapes: tuple[int, ...], batch: bool = True, **dynamic: Any) -> Path:
    images = tuple(torch.randn(shape) for shape in shapes)
    sides = tuple({0: torch.export.Dim("batch"), **dynamic} for _ in shapes) if batch else None
    torch.export.save(torch.export.export(model, images, dynamic_shapes=sides), path)
    return path


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("programs") / "net.pt2", network(), (2, 3, 32, 32))


def changed(program: Path, path: Path, change: Callable[[str, bytes], bytes | None], **more: bytes) -> Path:
    """A copy with what ``change`` makes of each file, by the name below the archive's folder."""
    with zipfile.ZipFile(program) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            root, _, inner = name.partition("/")
            if (data := change(inner, old.read(name))) is not None:
                new.writestr(name, data)
        for name, data in more.items():
            new.writestr(f"{root}/{name.replace('__', '/')}.pt", data)
    return path


def with_json(program: Path, path: Path, name: str, edit: Callable[[Any], None]) -> Path:
    def change(inner: str, data: bytes) -> bytes:
        if inner != name:
            return data
        content = json.loads(data)
        edit(content)
        return json.dumps(content).encode()

    return changed(program, path, change)


def test_it_is_the_network_that_was_exported(program: Path) -> None:
    assert is_program(program)
    found = load_own(program).checkpoint
    assert (found.config.task, found.config.num_classes, found.preprocessing.image_size) == ("classification", 4, 32)
    assert found.config.blocks == ("stem", "blocks.0", "blocks.1", "blocks.2", "head")
    assert found.config.origin.reference == "net.pt2"
    assert found.sha256 is not None
    assert set(found.state) == set(network().state_dict())
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(found.model()(images)["logits"], network()(images)["logits"])


@pytest.mark.usefixtures("quick")
def test_every_check_holds_without_any_code(program: Path, tmp_path: Path) -> None:
    result = dmformer.export(program, output=tmp_path / "b", use_cache=False)
    assert result.parity.passed
    assert {"layers"} <= {check.stage for check in result.parity.checks}
    assert result.manifest.model.weights == "checkpoint"
    assert dmformer.verify(tmp_path / "b", weights=program).passed
    other = saved(tmp_path / "other.pt2", Network().eval(), (2, 3, 32, 32))
    failed = dmformer.verify(tmp_path / "b", weights=other)
    assert "golden" in {check.stage for check in failed.checks if not check.passed}


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_the_cache_knows_it_by_its_content(program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMFORMER_CACHE", str(tmp_path / "cache"))
    first = dmformer.export(program, output=tmp_path / "a")
    assert not first.manifest.evidence.cached
    assert dmformer.export(program, output=tmp_path / "b").manifest.evidence.cached
    other = saved(tmp_path / "other.pt2", Network().eval(), (2, 3, 32, 32))
    assert not dmformer.export(other, output=tmp_path / "c").manifest.evidence.cached


def test_what_it_takes_is_looked_at(tmp_path: Path) -> None:
    apart = saved(tmp_path / "apart.pt2", Apart().eval(), (4, 3, 32, 32), batch=False)
    with pytest.raises(
        UsageError, match=r"batches of 4 alone; expected an open batch size: torch.export.export\("
    ) as e:
        load_program(apart)
    one_line(e.value)
    two = saved(tmp_path / "two.pt2", Two(), (2, 3, 32, 32), (2, 3, 32, 32))
    with pytest.raises(UsageError, match="takes 2 inputs; expected one"):
        load_program(two)


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_a_fixed_batch_is_opened(batch: int, tmp_path: Path) -> None:
    model, images = network(), torch.rand(5, 3, 32, 32)
    program = load_program(saved(tmp_path / "fixed.pt2", model, (batch, 3, 32, 32), batch=False))
    with torch.no_grad():
        torch.testing.assert_close(program.network(images), model(images))


class Apart(Network):
    """Answers with the distance from the mean of its batch, which no image alone has."""

    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x)["logits"]
        return logits - logits.mean(0, keepdim=True)


class Two(Network):
    def forward(self, x: Tensor, y: Tensor) -> Any:
        return super().forward(x + y)


class Touch:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def pickled(thing: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


def test_pickles_in_it_are_not_read(program: Path, tmp_path: Path) -> None:
    trap = tmp_path / "touched"
    samples = changed(
        program, tmp_path / "a.pt2",
        lambda name, data: pickled((Touch(trap),)) if name.startswith("data/sample_inputs/") else data,
    )  # fmt: skip
    load_program(samples)  # they are not needed

    def pickle_first(config: Any) -> None:
        next(iter(config["config"].values()))["use_pickle"] = True

    weights = with_json(program, tmp_path / "b.pt2", "data/weights/model_weights_config.json", pickle_first)
    with pytest.raises(UsageError, match="holds a pickled object"):
        load_program(weights)
    entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": False, "tensor_meta": None}
    constant = with_json(
        program, tmp_path / "c.pt2", "data/constants/model_constants_config.json", lambda c: c["config"].update(x=entry)
    )
    with pytest.raises(UsageError, match="holds a pickled object, 'x'"):
        load_program(constant)
    legacy = changed(
        program, tmp_path / "d.pt2", lambda _, data: data, data__weights__model=pickle.dumps({"a": Touch(trap)})
    )
    with pytest.raises(UsageError, match=r"holds the pickle 'data/weights/model.pt'"):
        load_program(legacy)
    assert not trap.exists()


def nodes_of(content: Any) -> list[Any]:
    found: list[Any] = content["graph_module"]["graph"]["nodes"]
    return found


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: nodes_of(c)[0].update(target="torch.os.system"), "has the operator torch.os.system"),
        (lambda c: nodes_of(c)[0].update(target="torch.ops.mine.run.default"), "has the operator torch.ops.mine.run"),
        (lambda c: nodes_of(c)[0].update(target="_operator.attrgetter"), "has the operator _operator.attrgetter"),
        (lambda c: nodes_of(c)[0].update(expr_str="__import__('os').abort()"), 'has a size "__import__'),
        (lambda c: nodes_of(c)[0].update(expr_str="Symbol.mro()"), "has a size 'Symbol.mro"),
        (lambda c: nodes_of(c)[0].update(out_spec='{"__enum__": true}'), "gives an object of a class of its own"),
        (lambda c: c.clear(), "cannot load"),
    ],
)
def test_what_would_be_run_is_refused(program: Path, tmp_path: Path, edit: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as refused:
        load_program(with_json(program, tmp_path / "x.pt2", "models/model.json", edit))
    one_line(refused.value)


def test_guards_are_not_run(program: Path, tmp_path: Path) -> None:
    trap = tmp_path / "touched"
    guarded = with_json(
        program, tmp_path / "x.pt2", "models/model.json", lambda c: c.update(guards_code=[f"open({str(trap)!r}, 'w')"])
    )
    load_own(guarded)
    assert not trap.exists()


def test_other_archives_are_refused(program: Path, tmp_path: Path) -> None:
    compiled = changed(program, tmp_path / "a.pt2", lambda _, d: d, data__aotinductor__model__net=b"")
    with pytest.raises(UsageError, match=r"a compiled program \(AOTInductor\), which is code"):
        load_program(compiled)
    with zipfile.ZipFile(tmp_path / "old.pt2", "w") as old:
        old.writestr("serialized_exported_program.json", "{}")
    with pytest.raises(UsageError, match=r"with 0 networks as PyTorch writes them from 2\.8 on"):
        load_program(tmp_path / "old.pt2")
    (tmp_path / "cut.pt2").write_bytes(program.read_bytes()[:3000])
    assert not is_program(tmp_path / "cut.pt2")
    with pytest.raises(UsageError, match="truncated, damaged or no PyTorch checkpoint"):
        load_checkpoint(tmp_path / "cut.pt2")
    with pytest.raises(UsageError, match="a network by itself: export and verify take it as `weights` alone"):
        load_checkpoint(program)
