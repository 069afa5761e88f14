"""How fast facts are edited, against a plain loop of the references' mathematics; ratios of one run.

    python benchmarks/editing.py [--facts 50] [--steps 20] [--device cpu|cuda] [--shape gpt2|gpt2-xl] [--layers 0-4]

On a GPT-2-shaped model with random weights: the value optimisation, the keys of all edited layers, the solves of
MEMIT and AlphaEdit, AlphaEdit's projectors, and the covariance (`covariance.py`). The plain loop takes one
fact at a time and runs the whole model for each step, over all positions, with logits of the whole vocabulary at every
position, as `compute_z` of the references does. (`compute_ks` puts up to 128 contexts into a pass; here it is a
fact's.) Both sides must give the same numbers, or the script ends with an error. Each side of a part runs in a process
of its own, one after the other, so that its peak memory is its own.

Rows are as long as CounterFact's with MEMIT's context templates: 80 % of the prompts begin with the subject, which has
2 to 6 tokens and 1 to 6 tokens behind it; a template has 10 tokens.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from retention_bench.editors import EditRequest, null_space_projector
from retention_bench.editors.alphaedit import _solve
from retention_bench.editors.locate.keys import SubjectStates
from retention_bench.editors.locate.linalg import cholesky
from retention_bench.editors.locate.value import optimise_values
from retention_bench.models import frozen

SHAPES = {"gpt2": (12, 12, 768), "gpt2-xl": (48, 25, 1600)}
"""Layers, heads and width."""
VALUE = {"lr": 0.5, "weight_decay": 0.5, "clamp_norm_factor": 0.75, "kl_factor": 0.0625}
RIDGE, LAMBDA, THRESHOLD = 10.0, 20_000.0, 2e-2
TOLERANCE = 1e-3
PARTS = ("values", "keys", "MEMIT solve", "AlphaEdit projector", "AlphaEdit solve", "covariance")
MATRICES = ("MEMIT solve", "AlphaEdit projector", "AlphaEdit solve")
"""The parts that run no model."""


def make_model(shape: str, device: str) -> GPT2LMHeadModel:
    """A GPT-2 with random weights, the same each time."""
    torch.manual_seed(0)
    layers, heads, width = SHAPES[shape]
    with torch.device(device):  # a GPU draws the numbers of a large model in no time
        return GPT2LMHeadModel(GPT2Config(n_layer=layers, n_head=heads, n_embd=width)).eval()


def make_facts(count: int) -> tuple[PreTrainedTokenizerFast, list[EditRequest], list[str]]:
    """A tokenizer with a token a word, facts of CounterFact's lengths, and five context templates of ten tokens."""
    words = [f"w{number}" for number in range(50256)]
    vocabulary = {word: number for number, word in enumerate([*words, "."])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="."))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    rng = random.Random(0)

    def phrase(length: int) -> str:
        return " ".join(rng.choice(words) for _ in range(length))

    facts = []
    for number in range(count):
        before = phrase(rng.choice([3, 4])) + " " if rng.random() < 0.2 else ""
        prompt = before + "{} " + phrase(rng.randint(1, 6))
        facts.append(EditRequest(str(number), prompt, phrase(rng.randint(2, 6)), phrase(rng.choice([1, 1, 1, 2]))))
    templates = [f"{phrase(10)} . {{}}" for _ in range(5)]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer), facts, templates


def make_covariance(size: int, layers: list[int], device: str) -> dict[int, torch.Tensor]:
    """Covariances with a spectrum that falls like those of text: a tenth of the directions carry nearly all."""
    generator = torch.Generator(device).manual_seed(0)
    covariances = {}
    for layer in layers:
        keys = torch.randn(2 * size, size, generator=generator, device=device)
        keys *= torch.logspace(0.5, -3, size, device=device)
        covariances[layer] = keys.T @ keys / len(keys)
    return covariances


def locate(tokenizer, text: str, subject_end: int) -> tuple[list[int], int]:
    """Token ids, and the index of the token that ends where the subject does."""
    return tokenizer.encode(text), len(tokenizer.encode(text[:subject_end])) - 1


def plain_rows(tokenizer, request: EditRequest, templates: list[str], target: list[int]) -> list[tuple[list[int], int]]:
    """The fact's rows in all templates with the target but for its last token."""
    question = request.prompt.replace("{}", request.subject)
    end = request.prompt.index("{}") + len(request.subject)
    rows = []
    for template in ["{}", *templates]:
        ids, at = locate(tokenizer, template.replace("{}", question), template.index("{}") + end)
        rows.append((ids + target[:-1], at))
    return rows


def plain_batch(rows: list[tuple[list[int], int]], device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids and mask, padded on the right, and the subjects' indices."""
    length = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in rows], device=device)
    mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in rows], device=device)
    return ids, mask, torch.tensor([at for _, at in rows], device=device)


def plain_value(model, tokenizer, request, templates, layer, steps, device) -> torch.Tensor:
    """MEMIT's compute_z, as its authors run it: one fact, the whole model, the vocabulary projected twice."""
    target = tokenizer.encode(request.target_new, add_special_tokens=False)
    rows = plain_rows(tokenizer, request, templates, target)
    lengths = [len(ids) for ids, _ in rows]
    rows.append(locate(tokenizer, f"{request.subject} w0 w1", len(request.subject)))
    ids, mask, at = plain_batch(rows, device)
    prompts = len(rows) - 1
    labels = torch.full((prompts, ids.shape[1]), -100, device=device)
    for row, length in enumerate(lengths):
        labels[row, length - len(target) : length] = torch.tensor(target, device=device)
    delta = torch.zeros(model.config.n_embd, device=device, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=VALUE["lr"])
    held: dict[str, torch.Tensor] = {}

    def add(module, inputs, output):
        held.setdefault("initial", output[0, at[0]].detach().clone())
        moved = output.clone()
        moved[torch.arange(len(at)), at] += delta
        return moved

    def keep(module, inputs, output):
        held["top"] = output

    handles = [
        model.transformer.h[layer].register_forward_hook(add),
        model.transformer.h[-1].register_forward_hook(keep),
    ]
    old = None
    for step in range(steps):
        logits = model(input_ids=ids, attention_mask=mask).logits
        new = logits[-1, at[-1]].log_softmax(-1)
        old = new.detach() if old is None else old
        every = (model.transformer.ln_f(held["top"][:prompts]) @ model.lm_head.weight.T).log_softmax(-1)
        picked = every.gather(2, labels.clamp_min(0)[..., None])[..., 0] * (labels >= 0)
        nll = -picked.sum(1).mean() / len(target)
        kl = torch.nn.functional.kl_div(old[None], new[None], log_target=True, reduction="batchmean")
        norm = held["initial"].norm()
        loss = nll + VALUE["kl_factor"] * kl + VALUE["weight_decay"] * delta.norm() / norm**2
        if loss < 5e-2 or step == steps - 1:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            if delta.norm() > VALUE["clamp_norm_factor"] * norm:
                delta.mul_(VALUE["clamp_norm_factor"] * norm / delta.norm())
    for handle in handles:
        handle.remove()
    return held["initial"] + delta.detach()


@torch.no_grad()
def plain_keys(model, tokenizer, requests, templates, layers, device) -> dict[int, torch.Tensor]:
    """The mean keys layer by layer, with a pass of the whole model for every fact."""
    found: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
    for layer in layers:
        for request in requests:
            ids, mask, at = plain_batch(plain_rows(tokenizer, request, templates, [0]), device)
            kept: dict[str, torch.Tensor] = {}
            handle = model.transformer.h[layer].mlp.c_proj.register_forward_pre_hook(
                lambda _, inputs, kept=kept: kept.update(keys=inputs[0])
            )
            model(input_ids=ids, attention_mask=mask)
            handle.remove()
            keys = kept["keys"][torch.arange(len(at)), at]
            found[layer].append((keys[0] + keys[1:].mean(0)) / 2)
    return {layer: torch.stack(keys) for layer, keys in found.items()}


def run_model(part, side, model, tokenizer, facts, templates, layers, steps) -> dict[str, torch.Tensor]:
    """Run one side of a part that runs a model."""
    device = model.device.type
    if part == "values" and side == "ours":
        with frozen(model):
            values = optimise_values(model, tokenizer, facts, templates, layers[-1], site="block", steps=steps, **VALUE)
        return {"values": values}
    if part == "values":
        model.requires_grad_(False)
        values = [plain_value(model, tokenizer, fact, templates, layers[-1], steps, device) for fact in facts]
        return {"values": torch.stack(values)}
    if side == "ours":
        states = SubjectStates(model, tokenizer, facts, templates)
        return {str(layer): states.mean_keys(layer) for layer in layers}
    return {str(k): v for k, v in plain_keys(model, tokenizer, facts, templates, layers, device).items()}


def run_side(part: str, side: str, options: argparse.Namespace, out: Path) -> float:
    """Run one side of one part and save its numbers; returns its seconds."""
    device, layers = options.device, options.layers
    size = 4 * SHAPES[options.shape][2]
    if part in MATRICES:
        generator = torch.Generator().manual_seed(1)
        keys = torch.randn(options.facts, size, generator=generator).to(device)
        residual = torch.randn(options.facts, size // 4, generator=generator).to(device)
        covariances = make_covariance(size, layers, device)
        if part == "AlphaEdit solve":
            projectors = {layer: null_space_projector(C, THRESHOLD) for layer, C in covariances.items()}
        # Small ones first, so that neither side pays for what torch sets up once.
        small = covariances[layers[0]][:64, :64] + torch.eye(64, device=device)
        for matrix in (small, small.double()):
            torch.linalg.solve(matrix, matrix), torch.linalg.cholesky(matrix), torch.linalg.eigh(matrix)
            torch.linalg.svd(matrix)
    else:
        model = make_model(options.shape, device)
        tokenizer, facts, templates = make_facts(options.facts)
        # A first pass, so that neither side pays for what torch sets up once. A GPU also loads a kernel when it is
        # called first, so there it is a run of three steps.
        model(torch.zeros(1, 8, dtype=torch.long, device=device))
        if device == "cuda":
            run_model(part, side, model, tokenizer, facts, templates, layers, 3)
    synchronise(device)
    began = time.perf_counter()
    if part not in MATRICES:
        result = run_model(part, side, model, tokenizer, facts, templates, layers, options.steps)
    elif part == "MEMIT solve":
        result = {}
        for layer in layers:
            if side == "ours":
                wide = keys.double()
                adjusted = torch.cholesky_solve(
                    wide.T, cholesky(LAMBDA * covariances[layer].double() + wide.T @ wide, layer)
                )
            else:
                wide = keys.T.double()
                adjusted = torch.linalg.solve(LAMBDA * covariances[layer].double() + wide @ wide.T, wide)
            result[str(layer)] = (adjusted @ residual.double()).float()
    elif part == "AlphaEdit projector":
        result = {}
        for layer in layers:
            if side == "ours":
                result[str(layer)] = null_space_projector(covariances[layer], THRESHOLD).float()
            else:
                vectors, values, _ = torch.linalg.svd(covariances[layer], full_matrices=False)
                unused = vectors[:, values < THRESHOLD]
                result[str(layer)] = unused @ unused.T
    else:
        result = {}
        for layer in layers:
            if side == "ours":
                left, right = _solve(keys, residual, projectors[layer], RIDGE, None)
                result[str(layer)] = (left @ right).float()
            else:
                projector = projectors[layer].float()
                system = projector @ (keys.T @ keys) + RIDGE * torch.eye(size, device=device)
                result[str(layer)] = torch.linalg.solve(system, projector @ keys.T @ residual)
    synchronise(device)
    seconds = time.perf_counter() - began
    save_file({name: tensor.cpu().contiguous() for name, tensor in result.items()}, out)
    return seconds


def synchronise(device: str) -> None:
    """Wait for the GPU, so that its time is counted."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak_mib(device: str) -> float:
    """Peak memory of this process: on the GPU what tensors took, on the CPU the resident set, set-up included."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def differences(part: str, ours: Path, plain: Path) -> float:
    """The largest relative difference of the two sides' numbers: of a fact's value or key, or of a layer's change."""
    left, right = load_file(ours), load_file(plain)
    over = (0, 1) if part in MATRICES else 1
    return max(((left[n] - right[n]).norm(dim=over) / right[n].norm(dim=over)).max().item() for n in right)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--facts", type=int, default=50)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="gpt2")
    parser.add_argument("--layers", default="0-4", help="the edited layers; the value is optimised at the last")
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--side", nargs=3, help=argparse.SUPPRESS)  # part, side, file: used by the script itself
    options = parser.parse_args()
    first, _, last = options.layers.partition("-")
    options.span, options.layers = options.layers, list(range(int(first), int(last or first) + 1))
    return options


def main() -> None:
    """Run the parts, both sides each, and print the table."""
    options = parse()
    if options.side:
        part, side, out = options.side
        seconds = run_side(part, side, options, Path(out))
        print(json.dumps({"seconds": seconds, "peak_mib": peak_mib(options.device)}))
        return
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(
        f"{options.shape}-shaped random model, {where}, {options.facts} facts, {options.steps} steps, layers "
        f"{options.span}, torch {torch.__version__}\n"
    )
    print("| part | ours, s | plain loop, s | ratio | ours, MiB | plain loop, MiB | largest relative difference |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for part in [part for part in options.parts if part != "covariance"]:
            found, files = {}, {}
            for side in ("ours", "plain"):
                files[side] = Path(folder) / f"{side}.safetensors"
                command = [sys.executable, __file__, "--side", part, side, str(files[side]), "--layers", options.span]
                for name in ("facts", "steps", "device", "shape"):
                    command += [f"--{name}", str(getattr(options, name))]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                found[side] = json.loads(done.stdout.splitlines()[-1])
            ours, plain, apart = found["ours"], found["plain"], differences(part, files["ours"], files["plain"])
            print(
                f"| {part} | {ours['seconds']:.2f} | {plain['seconds']:.2f} | {plain['seconds'] / ours['seconds']:.1f} "
                f"| {ours['peak_mib']:.0f} | {plain['peak_mib']:.0f} | {apart:.1e} |",
                flush=True,
            )
            if not apart < TOLERANCE:
                raise SystemExit(f"{part}: the two sides differ by {apart:.1e}, more than {TOLERANCE:g}.")
    if "covariance" in options.parts:
        print("\nCovariance of five layers of a GPT-2 of the small shape, on the CPU:", flush=True)
        script = Path(__file__).with_name("covariance.py")
        subprocess.run([sys.executable, str(script), str(torch.get_num_threads())], check=True)


if __name__ == "__main__":
    main()
