"""Measures the saved checkpoint on held-out pictures: greedy answers of transformers' own classes.

    python -m vlmc.demo.evaluate --model demo/model --count 1000

Short answers must match exactly; of a caption, the facts in it are counted. Intervals are Wilson's, 95 %.
"""

import argparse
import math
import platform
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForImageTextToText, AutoProcessor

from .questions import Question
from .scenes import Scene, scene
from .words import SPLITS, TASKS


def wilson(hits: int, of: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share."""
    if of == 0:
        return 0.0, 1.0
    share, square = hits / of, z * z / of
    middle = (share + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt(share * (1 - share) / of + square / (4 * of))
    return max(0.0, middle - half), min(1.0, middle + half)


def score(question: Question, said: str) -> tuple[int, int]:
    """Right and asked: one for a short answer, one per fact for a caption."""
    if question.facts:
        return sum(fact in said.lower() for fact in question.facts), len(question.facts)
    return int(said == question.answer), 1


class Answerer:
    """The checkpoint as a person with transformers would use it."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = getattr(torch, dtype)
        self.processor = AutoProcessor.from_pretrained(folder)
        model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=self.dtype)
        self.model = model.to(self.device).eval()

    def __call__(self, scenes: Sequence[Scene], prompts: Sequence[str]) -> list[str]:
        texts = []
        for prompt in prompts:
            content = [{"type": "image"}, {"type": "text", "text": prompt}]
            chat = [{"role": "user", "content": content}]
            texts.append(self.processor.apply_chat_template(chat, add_generation_prompt=True))
        images = [[s.image] for s in scenes]
        inputs = self.processor(text=texts, images=images, padding=True, return_tensors="pt")
        inputs = inputs.to(self.device, self.dtype)
        with torch.inference_mode():
            made = self.model.generate(**inputs, do_sample=False, max_new_tokens=64)
        said = self.processor.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in said]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the demo model on held-out pictures.")
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--dtype", choices=("float16", "float32", "bfloat16"), default="float16")
    parser.add_argument("--misses", type=int, default=0, help="wrong answers to print for each task")
    args = parser.parse_args()
    answer = Answerer(args.model, args.dtype)
    seeds = range(args.first, args.first + args.count)
    with ProcessPoolExecutor() as pool:
        scenes = list(pool.map(partial(scene, split=args.split), seeds, chunksize=16))
    begun, rows, whole = time.monotonic(), [], 0
    for number, task in enumerate(TASKS):
        hits = asked = shown = 0
        for at in range(0, len(scenes), args.batch):
            some = scenes[at : at + args.batch]
            questions = [s.questions[number] for s in some]
            for seed, q, said in zip(seeds[at:], questions, answer(some, [q.prompt for q in questions]), strict=False):
                right, of = score(q, said)
                hits, asked, whole = hits + right, asked + of, whole + (bool(q.facts) and said == q.answer)
                if right < of and shown < args.misses:
                    shown += 1
                    print(f"miss: {args.split} {seed}: {q.prompt} | {q.answer} | {said}")
        rows.append((task, "exact match" if number else "facts in the caption", hits, asked))
    rows.append((TASKS[0], "whole caption exact", whole, args.count))
    where = torch.cuda.get_device_name() if answer.device == "cuda" else platform.machine() + " CPU"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{args.count} {args.split} pictures from seed {args.first}; {args.dtype}; {where}; {versions}")
    print(f"answered in {time.monotonic() - begun:.0f} s\n")
    print("| task | measure | right | of | share | 95 % interval |\n| --- | --- | --- | --- | --- | --- |")
    for task, measure, right, of in rows:
        low, high = wilson(right, of)
        print(f"| {task} | {measure} | {right} | {of} | {right / of:.1%} | {low:.1%} to {high:.1%} |")


if __name__ == "__main__":
    main()
