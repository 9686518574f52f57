"""The accuracy of the trained model, by kind of question, as figures and as a table."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy
import torch
from PIL import Image
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from lvlm_fastxai.tiny import scenes
from lvlm_fastxai.tiny.data import easy_vqa

from ..common import machine
from ..common.results import write_results
from .backbone import NUM_IMAGE_TOKENS, features_of
from .decoder import AdaptedDecoder
from .model import load_real_lvlm
from .packing import pack
from .questions import Blocks, question_errors
from .report import table


def held_out_questions(count: int) -> Iterator[tuple[Any, list[Any]]]:
    """Draw held-out scenes, with one question of every kind that they allow."""
    for seed in range(scenes.HELD_OUT_SEEDS.start, scenes.HELD_OUT_SEEDS.start + count):
        scene = scenes.generate_scene(seed)
        yield scene.image, scenes.generate_questions(scene, numpy.random.default_rng([seed, 1]))


def easy_vqa_questions(count: int) -> Iterator[tuple[Any, list[Any]]]:
    """Open the first pictures of easy-VQA's test split, with all their questions."""
    for path, questions in islice(easy_vqa("test"), count):
        with Image.open(path) as file:
            yield file.convert("RGB"), questions


def accuracy(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, pictures: Iterator[tuple[Any, list[Any]]], bar: Any
) -> dict[str, dict[str, int]]:
    """Count by kind the questions asked, those answered right, and how often the commonest answer is right.

    An answer is right where every token, the end included, is the most likely one after the right tokens before it: the
    very condition under which greedy generation gives the answer word for word.
    """
    llava = model.model
    decoder = AdaptedDecoder(llava.language_model, model.lm_head.weight, rank=0, dtype=torch.float32)
    blocks = Blocks(processor.tokenizer)
    right: Counter[str] = Counter()
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    every = torch.arange(NUM_IMAGE_TOKENS)[None]
    for image, questions in pictures:
        with torch.inference_mode():
            pixels = processor.image_processor(images=image, return_tensors="pt")["pixel_values"]
            tokens = llava.multi_modal_projector(features_of(llava.vision_tower, pixels))[0]
            packed = pack(blocks.before, every.numel(), every, [[blocks.block(each) for each in questions]])
            errors = question_errors(decoder(tokens, packed), packed.targets, packed.question).tolist()
        for question, wrong in zip(questions, errors, strict=True):
            answers[question.kind][question.answer] += 1
            right[question.kind] += not wrong
        bar.update(1)
    return {
        kind: {"asked": said.total(), "right": right[kind], "commonest": said.most_common(1)[0][1]}
        for kind, said in answers.items()
    }


def evaluate(args: argparse.Namespace) -> int:
    """Measure the accuracy and write the results file."""
    torch.set_num_threads(args.threads)
    model, processor = load_real_lvlm(args.folder / "model")
    results: dict[str, Any] = {"training": json.loads((args.folder / "model" / "training.json").read_text())}
    streams = {
        "held-out scenes": (held_out_questions(args.scenes), args.scenes),
        "easy-VQA test": (easy_vqa_questions(args.easy_vqa), args.easy_vqa),
    }
    for title, (pictures, count) in streams.items():
        with tqdm(total=count, desc=title, unit="picture", file=sys.stderr) as bar:
            results[title] = {"pictures": count, "kinds": accuracy(model, processor, pictures, bar)}
    write_results(args.out, machine.describe(), results)
    print(table(json.loads(args.out.read_text())))
    return 0
