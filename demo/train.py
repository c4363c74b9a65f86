"""Trains the demo model on one GPU in minutes; README.md has the commands.

    python -m vlmc.demo.train --minutes 13 --sources FOLDER --state /tmp/demo-train --out /tmp/demo-model

Worker processes draw pictures without end. They go into a pool in the GPU's memory, from which every step
takes a random batch, so the GPU never waits for the drawing. The learning rate follows the clock, not the
steps. A state is kept every two minutes; the same command goes on from it.
"""

import argparse
import math
import os
import queue
import time
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn import functional as f
from transformers import SmolVLMForConditionalGeneration

from . import atlas, checkpoint
from .layout import SIDE
from .packing import CHUNK, LENGTH, chunks, work
from .words import TASKS

CAPTION_WEIGHT = 0.5  # of a caption's token, against 1 for a short answer's
HELD_OUT = 1 << 40  # first seed of the pictures that progress is measured on


class Pool:
    """Pictures and rows in device memory, oldest replaced first."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.pictures = torch.empty((size, SIDE, SIDE, 3), dtype=torch.uint8, device=device)
        self.rows = torch.empty((size, 2, 4, LENGTH), dtype=torch.int16, device=device)
        self.seen = 0

    @property
    def filled(self) -> int:
        return min(self.seen, len(self.pictures))

    def add(self, pictures: Any, rows: Any) -> None:
        at = torch.arange(self.seen, self.seen + len(pictures), device=self.rows.device) % len(self.pictures)
        self.pictures[at] = torch.from_numpy(pictures).to(at.device, non_blocking=True)
        self.rows[at] = torch.from_numpy(rows).to(at.device, non_blocking=True)
        self.seen += len(pictures)

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        at = torch.randint(self.filled, (size,), device=self.rows.device)
        flip = torch.randint(2, (size,), device=self.rows.device)
        pictures = self.pictures[at]
        pictures = torch.where(flip.bool()[:, None, None, None], pictures.flip(2), pictures)
        return pictures, self.rows[at, flip]


def pixels(pictures: Tensor, jitter: bool) -> Tensor:
    """As the image processor: channels first, -1 to 1. Training varies contrast and noise a little."""
    values = pictures.permute(0, 3, 1, 2).float() / 127.5 - 1.0
    if jitter:
        shape = (len(values), 1, 1, 1)
        gain = 1 + 0.08 * (2 * torch.rand(shape, device=values.device) - 1)
        shift = 0.06 * (2 * torch.rand(shape, device=values.device) - 1)
        noise = 0.03 * torch.rand(shape, device=values.device) * torch.randn_like(values)
        values = (values * gain + shift + noise).clamp(-1, 1)
    return values


def logits(model: SmolVLMForConditionalGeneration, values: Tensor, rows: Tensor) -> Tensor:
    """The model's own modules, called so that one row may hold many questions."""
    inner, vision = model.model, model.model.vision_model
    hidden = vision.embeddings.patch_embedding(values).flatten(2).transpose(1, 2)
    hidden = hidden + vision.embeddings.position_embedding.weight
    for layer in vision.encoder.layers:
        hidden = layer(hidden, None)
    features = inner.connector(vision.post_layernorm(hidden))
    tokens, positions, segments = rows[:, 0].long(), rows[:, 1].long(), rows[:, 2]
    embedded = inner.text_model.embed_tokens(tokens)
    start = 5  # <|im_start|> User : <fake_token_around_image> <global-img>
    count = checkpoint.IMAGE_TOKENS
    embedded = torch.cat((embedded[:, :start], features.to(embedded.dtype), embedded[:, start + count :]), 1)
    same = (segments[:, :, None] == segments[:, None, :]) | (segments[:, None, :] == 0)
    earlier = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=tokens.device).tril()
    out = inner.text_model(
        inputs_embeds=embedded,
        attention_mask=(same & earlier)[:, None],
        position_ids=positions,
        use_cache=False,
    )
    guesses: Tensor = model.lm_head(out.last_hidden_state[:, :-1])
    return guesses


def loss_of(model: SmolVLMForConditionalGeneration, values: Tensor, rows: Tensor) -> Tensor:
    guesses = logits(model, values, rows)
    tasks, targets = rows[:, 3, 1:], rows[:, 0, 1:].long()
    weight = (tasks > 0).float() * torch.where(tasks == 1, CAPTION_WEIGHT, 1.0)
    each = f.cross_entropy(guesses.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return (each * weight.flatten()).sum() / weight.sum()


@torch.no_grad()
def accuracy(model: SmolVLMForConditionalGeneration, values: Tensor, rows: Tensor) -> dict[str, float]:
    """The share of questions whose every answer token is right when the ones before it are given."""
    right = {task: [0, 0] for task in TASKS}
    for at in range(0, len(rows), 128):
        part, some = values[at : at + 128], rows[at : at + 128]
        with torch.autocast(values.device.type, torch.bfloat16, enabled=values.is_cuda):
            best = logits(model, part, some).argmax(-1)
        missed = (best != some[:, 0, 1:]) & (some[:, 3, 1:] > 0)
        for segment in range(1, int(some[:, 2].max()) + 1):
            inside = (some[:, 2, 1:] == segment) & (some[:, 3, 1:] > 0)
            task = torch.where(inside, some[:, 3, 1:], 0).amax(1)
            wrong = (missed & inside).any(1)
            for number, name in enumerate(TASKS, 1):
                asked = task == number
                right[name][0] += int((asked & ~wrong).sum())
                right[name][1] += int(asked.sum())
    return {name: hit / max(1, of) for name, (hit, of) in right.items()}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--minutes", type=float, default=13.0, help="of training, all runs together")
    parser.add_argument("--sources", type=Path, help="Fashion-MNIST and more photographs; without it, the atlas only")
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--pool", type=int, default=400_000, help="pictures kept in device memory")
    parser.add_argument("--start", type=int, default=16_000, help="pictures drawn before the first step")
    parser.add_argument("--held", type=int, default=256, help="pictures that progress is measured on")
    parser.add_argument("--report", type=float, default=30.0, help="seconds between progress lines")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


def main() -> None:
    args = parsed()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.state.mkdir(parents=True, exist_ok=True)
    words = checkpoint.tokenizer()
    words.save_pretrained(args.state / "tokenizer")
    model: Any = checkpoint.fresh(words).to(device)
    model.train()
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=args.rate,
        betas=(0.9, 0.98),
        fused=device.type == "cuda",
    )
    done, steps, drawn = 0.0, 0, 0
    kept = args.state / "state.pt"
    if kept.exists():
        state = torch.load(kept, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done, steps, drawn = state["seconds"], state["steps"], state["drawn"]
        print(f"going on after {done:.0f} s, {steps} steps", flush=True)

    context = mp.get_context("spawn")
    ready: Any = context.Queue(maxsize=4 * args.workers)
    first = drawn // CHUNK + args.workers if drawn else 0
    workers = [
        context.Process(
            target=work,
            args=(ready, args.sources, args.state / "tokenizer", first + i, args.workers),
            daemon=True,
        )
        for i in range(args.workers)
    ]
    for worker in workers:
        worker.start()
    held = next(chunks(words, iter([range(HELD_OUT, HELD_OUT + args.held)]), "train", atlas.bundled("calibration")))
    held_pixels = pixels(torch.from_numpy(held[0]).to(device), jitter=False)
    held_rows = torch.from_numpy(held[1][:, 0]).to(device)
    pool = Pool(args.pool, device)
    while pool.seen < args.start:
        pool.add(*ready.get())
    print(f"{pool.seen} pictures drawn", flush=True)

    step_loss = torch.compile(loss_of) if args.compile else loss_of
    total, begun, reported = args.minutes * 60, time.monotonic() - done, time.monotonic()
    saved, losses = reported, []
    while (spent := time.monotonic() - begun) < total:
        share = spent / total
        rate = args.rate * min(1.0, (steps + 1) / 400) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        pictures, rows = pool.batch(args.batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = step_loss(model, pixels(pictures, jitter=True), rows)
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no types for it
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps += 1
        losses.append(loss.detach())
        for _ in range(8):
            try:
                pool.add(*ready.get_nowait())
            except queue.Empty:
                break
        if steps % 20 == 0:
            loss.item()  # wait, so that the clock is true
        now = time.monotonic()
        if now - reported > args.report:
            model.eval()
            scores = " ".join(f"{name} {score:.3f}" for name, score in accuracy(model, held_pixels, held_rows).items())
            model.train()
            mean = float(torch.stack(losses).mean())
            losses, reported = [], now
            print(f"{spent:6.0f} s {steps} steps {drawn + pool.seen} drawn loss {mean:.4f} {scores}", flush=True)
        if now - saved > 120:
            saved = now
            _keep(kept, model, optimizer, spent, steps, drawn + pool.seen)
    _keep(kept, model, optimizer, time.monotonic() - begun, steps, drawn + pool.seen)
    for worker in workers:
        worker.terminate()
    scores = " ".join(f"{name} {score:.3f}" for name, score in accuracy(model.eval(), held_pixels, held_rows).items())
    print(
        f"finished: {steps} steps, batches of {args.batch}, {drawn + pool.seen} pictures drawn; {scores}",
        flush=True,
    )
    if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
        raise SystemExit("training went wrong: a weight is not a finite number")
    checkpoint.save(model, words, args.out)


def _keep(path: Path, model: Any, optimizer: Any, seconds: float, steps: int, drawn: int) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    state |= {"seconds": seconds, "steps": steps, "drawn": drawn}
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").rename(path)


if __name__ == "__main__":
    main()
