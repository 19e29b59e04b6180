import socket
import sys

import pytest
import torch
import torchvision
from torch import nn

import cifarnet
from cifarnet.build import build
from cifarnet.errors import UserError
from cifarnet.models.library import LibraryModel
from cifarnet.resuming import resume
from cifarnet.train import train


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*arguments):
        raise AssertionError(f"a download: {arguments}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


KINDS = [
    ("timm", "resnet10t", {}),
    ("timm", "mobilenetv3_small_050", {"drop_path_rate": 0.1}),
    ("timm", "vit_tiny_patch16_224", {"patch_size": 4, "depth": 2}),
    ("timm", "convnext_atto", {"depths": [1, 1, 1, 1], "patch_size": 2}),
    ("timm", "regnetx_002.pycls_in1k", {}),
    ("timm", "mixer_s32_224", {}),
    ("timm", "repvgg_a0", {}),  # its first convolutions are parallel
    ("torchvision", "shufflenet_v2_x0_5", {}),
    ("torchvision", "squeezenet1_1", {}),
]


@pytest.mark.parametrize(("library", "name", "settings"), KINDS, ids=lambda value: str(value)[:30])
def test_architectures_of_different_kinds(library, name, settings):
    pytest.importorskip(library)
    network = LibraryModel(library, name, num_classes=7, **settings)
    logits = network(torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8))
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    assert all(weight.grad is not None for weight in network.parameters())


def layers(network: nn.Module) -> list[tuple]:
    return [(*conv.kernel_size, *conv.stride) for conv in network.modules() if isinstance(conv, nn.Conv2d)]


def pools(network: nn.Module) -> int:
    return sum(isinstance(layer, nn.MaxPool2d) for layer in network.modules())


@pytest.mark.parametrize(
    ("library", "name", "before", "after", "fewer_pools"),
    [
        ("torchvision", "resnet18", [(7, 7, 2, 2)], [(3, 3, 1, 1)], 1),
        ("torchvision", "mobilenet_v3_small", [(3, 3, 2, 2)], [(3, 3, 1, 1)], 0),
        ("torchvision", "squeezenet1_1", [(3, 3, 2, 2)], [(3, 3, 1, 1)], 1),
        ("torchvision", "vgg11", [(3, 3, 1, 1)], [(3, 3, 1, 1)], 0),
        ("timm", "resnet18", [(7, 7, 2, 2)], [(3, 3, 1, 1)], 1),
        ("timm", "resnet18d", [(3, 3, 2, 2)], [(3, 3, 1, 1)], 1),
        ("timm", "efficientnet_b0", [(3, 3, 2, 2)], [(3, 3, 1, 1)], 0),
        ("timm", "convnext_atto", [(4, 4, 4, 4)], [(4, 4, 4, 4)], 0),  # patches
        ("timm", "levit_128s", [(3, 3, 2, 2)], [(3, 3, 2, 2)], 0),  # it depends on the size of its stem's output
        ("timm", "repvgg_a0", [(3, 3, 2, 2), (1, 1, 2, 2)], [(3, 3, 1, 1), (1, 1, 1, 1)], 0),
    ],
)
def test_stems_are_adapted_to_small_images(library, name, before, after, fewer_pools):
    pytest.importorskip(library)
    with torch.device("meta"):
        plain, small = (LibraryModel(library, name, small_stem=small) for small in (False, True))
    count = len(before)
    assert (layers(plain)[:count], layers(small)[:count]) == (before, after)
    assert layers(plain)[count:] == layers(small)[count:]
    assert pools(plain) - pools(small) == fewer_pools


@pytest.mark.parametrize(
    ("library", "settings", "message"),
    [
        *(
            ("timm", {"name": name}, r"model\.name=.*timm .* no such network")
            for name in ("hf-hub:a/b", "hf_hub:a/b", "HF-HUB:a/b", "local-dir:/x", "timm:resnet18", "a/resnet18", "")
        ),
        ("timm", {"name": "resnet_18"}, r"no such network\. Did you mean resnet"),
        ("timm", {"name": "resnet18.nothing"}, "timm cannot build this network"),
        ("timm", {"name": "resnet18", "nothing": 1}, "unexpected keyword argument 'nothing'"),
        ("torchvision", {"name": "resnet19"}, r"no such network\. Did you mean resnet1"),
        ("torchvision", {"name": "https://x.y/resnet18"}, "no such network"),
        ("torchvision", {"name": "resnet18", "nothing": 1}, "unexpected keyword argument 'nothing'"),
        *(
            (library, {"name": "resnet18", key: value}, rf"model\.{key} .*model\.checkpoint=")
            for library in ("timm", "torchvision")
            for key, value in {
                "pretrained": True,
                "pretrained_cfg": "hf-hub:a/b",
                "pretrained_cfg_overlay": {"hf_hub_id": "a/b"},
                "checkpoint_path": "x",
                "cache_dir": "x",
                "weights": "DEFAULT",
            }.items()
        ),
    ],
    ids=str,
)
def test_downloads_and_unknown_names_are_refused(library, settings, message):
    if library == "timm":
        pytest.importorskip("timm")
    with pytest.raises(UserError, match=message) as error:
        LibraryModel(library, **settings)
    assert "\n" not in str(error.value)


def test_without_timm_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"model=timm needs timm: pip install 'cifarnet\[timm\]'"):
        LibraryModel("timm", "resnet18")


@pytest.mark.parametrize(
    ("library", "name", "settings"),
    [("timm", "resnet10t", {}), ("timm", "vit_tiny_patch16_224", {"depth": 1}), ("torchvision", "resnet18", {})],
)
def test_fit_loads_pretrained_weights_from_a_file(library, name, settings, tmp_path):
    if library == "timm":
        pytest.importorskip("timm")
    torch.manual_seed(0)
    pretrained = LibraryModel(library, name, 1000, 224, small_stem=False, **settings).network
    file = tmp_path / "weights.pth"
    torch.save(pretrained.state_dict(), file)
    network = LibraryModel(library, name, 10, checkpoint=str(file), **settings)
    fresh = {key: value.clone() for key, value in network.network.state_dict().items()}
    network.fit(torch.zeros(1))
    expected, loaded = pretrained.state_dict(), network.network.state_dict()
    same = [key for key in loaded if key in expected and torch.equal(loaded[key], expected[key])]
    other = {key for key in loaded if key not in same}
    resized = {"resnet10t": set(), "resnet18": {"conv1.weight"}}.get(name, {"pos_embed"})
    assert other - {"fc.weight", "fc.bias", "head.weight", "head.bias"} == resized
    if name == "resnet18":  # the center of the kernel
        torch.testing.assert_close(loaded["conv1.weight"], expected["conv1.weight"][:, :, 2:5, 2:5] * 7 / 3)
    assert any(not torch.equal(loaded[key], fresh[key]) for key in same)


@pytest.mark.parametrize("content", [None, b"no checkpoint", {}, {"a": 1}, {"a": torch.zeros(1)}], ids=str)
@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_files_without_such_weights_are_refused(library, content, tmp_path):
    if library == "timm":
        pytest.importorskip("timm")
    file = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    name = {"timm": "resnet10t", "torchvision": "squeezenet1_1"}[library]
    with pytest.raises(UserError, match=r"model\.(checkpoint|name)=") as error:
        LibraryModel(library, name, checkpoint=str(file)).fit(torch.zeros(1))
    assert "\n" not in str(error.value)


def test_a_trained_network_is_loaded_without_its_pretrained_weights(config, tmp_path):
    file = tmp_path / "weights.pth"
    network = torchvision.models.squeezenet1_1(num_classes=1000)
    torch.save(network.state_dict(), file)
    settings = ["model=torchvision", "model.name=squeezenet1_1", f"model.checkpoint={file}"]
    built = build(config(*settings, without="model"))
    last = "network.network.features.12.squeeze.weight"
    assert torch.equal(built.classifier.state_dict()[last], network.state_dict()["features.12.squeeze.weight"])
    built.trainer.strategy.connect(built.classifier)
    built.trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    file.unlink()
    loaded, _ = cifarnet.load(tmp_path / "a.ckpt")
    assert torch.equal(loaded.state_dict()[last.removeprefix("network.")], built.classifier.state_dict()[last])


@pytest.mark.slow
def test_a_run_resumes_without_its_pretrained_weights(config, tmp_path):
    file = tmp_path / "weights.pth"
    torch.save(torchvision.models.squeezenet1_1(num_classes=1000).state_dict(), file)
    settings = ["model=torchvision", "model.name=squeezenet1_1", f"model.checkpoint={file}", "scheduler=constant"]
    before = train(config(*settings, without="model")).val_accuracy
    file.unlink()
    assert train(*resume(tmp_path / "run")).val_accuracy == before
