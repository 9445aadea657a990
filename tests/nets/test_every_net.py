"""What must hold for every net, ours and very different timm families: it compiles whole, fits a batch, its state goes round."""

import io

import pytest
import torch

from fastffl import nets
from fastffl.train import Learner

SIZE = 32
TIMM = [
    "resnet18",
    "regnety_002",
    "efficientnet_b0",
    "mobilenetv2_050",
    "mobilenetv3_small_050",
    "convnext_atto",
    "repvgg_a0",
    "densenet121",
    "swin_tiny_patch4_window7_224",
    "ghostnet_050",
    "vit_tiny_patch16_224",
    "mixer_s32_224",
    "selecsls42",
    "poolformerv2_s12",
    "fastvit_t8",
]
ZOO = [n for n in nets.ZOO if n not in ("resnet110", "wrn40_2")]  # the deep ones are the same code as the shallow
EVERY = [*ZOO, *TIMM]


def learner(name: str) -> Learner:
    torch.manual_seed(0)
    return Learner([name, "resnet8"], "ffl", classes=4, size=SIZE)


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(8, 3, SIZE, SIZE), torch.arange(8) % 4, torch.tensor(0.5)


@pytest.mark.parametrize("name", EVERY)
def test_fits_one_batch(name: str) -> None:
    model = learner(name)
    x, y, w = batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(60):
        optimizer.zero_grad()
        out = model(x, y, w)
        if step > 3 and bool((out.top1 == 8).all()):
            break
        out.loss.backward()
        optimizer.step()
    assert out.top1.tolist() == [8] * 4, f"after {step + 1} steps"


@pytest.mark.parametrize("name", EVERY)
def test_compiles_without_a_break(name: str) -> None:
    model = learner(name).eval()
    x, y, w = batch()
    with torch.no_grad():
        want = model(x[:2], y[:2], w)
        torch._dynamo.reset()
        got = torch.compile(model, fullgraph=True, backend="eager")(x[:2], y[:2], w)
    torch.testing.assert_close(got.loss, want.loss)


@pytest.mark.parametrize("name", EVERY)
def test_state_goes_round(name: str) -> None:
    model, other = learner(name), learner(name)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.01)
    x, _, _ = batch()
    model.cohort(x)  # running statistics move
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    with torch.no_grad():
        a, b = model.eval().votes(x), other.eval().votes(x)
    assert all(torch.equal(a[v], b[v]) for v in a)
