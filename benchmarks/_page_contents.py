"""What stands on the pages of results: their sections, with commands and with what their columns say."""

from __future__ import annotations

import _page_demo as demo
import _page_network as network
import _page_policies as policies
import _page_steps as steps
import _page_training as training
from _page_parts import Content, Page, Section

_STEP = "python benchmarks/train_step.py"
_QUARTILES = "medians, quartiles in brackets"


def _trained(title: str, name: str, config: str, notes: str, more: str = "") -> Section:
    """A section of the experiments; ``name`` is that of the records' section."""
    command, machine, body = training.command(name), training.machines(name), training.body(name)
    figures = {file.name for file in (training.RESULTS / "experiments").glob(f"{name}-flops.png")}
    return Section(
        title,
        training.files(config),
        command,
        more or "Accuracy is mean ± standard deviation over the seeds.",
        body,
        machine,
        notes,
        f"experiments/{next(iter(figures))}" if figures else "",
        f"configuration `{config}`.",
    )


def _no_machine(_: Content) -> str:
    return "The records hold no machine; torch 2.13.0 (CPU), 2026-11-25, was noted beside them."


_DEMO = Section(
    "The demo, by seeds",
    demo.RECORDS,
    demo.command,
    "Three small networks, exactly and by a recipe, in turn. Mean ± standard deviation over the seeds; times are "
    "shares of exact training's, of a step the median of each run. Setting up is not counted.",
    demo.body,
    demo.machines,
)

STEPS = Page(
    "steps.md",
    "Training steps and their parts",
    "Whole training steps, what choosing costs, rules side by side, single layers and products, on CPUs.",
    [
        Section(
            "Demand-driven sampling: a whole training step",
            ["train-step-wrn-vit.json", "train-step-resnet50.json"],
            f"{_STEP} --models wrn_16_4 vit_b_block --compile --memory --profile --runs 11\n"
            f"{_STEP} --models resnet50 --compile --memory --profile --runs 7 --warmup 2",
            "Forward, loss and backward in float32, all variants in turn in one process: 11 runs, ResNet-50 7; "
            f"{_QUARTILES}.",
            steps.steps,
            notes="Demand-driven sampling: a whole training step",
        ),
        Section(
            "Through both frontends",
            ["train-step-frontends.json", "train-step-frontends-resnet50.json"],
            f"{_STEP} --models wrn_16_4 vit_b_block --compile --dynamo --no-swap --no-narrow\n"
            f"{_STEP} --models resnet50 --compile --dynamo --no-swap --no-narrow --runs 9 --warmup 2",
            "The same steps after `transform`, and by `torch.compile(model, backend=fx_approx.backend(policy))` "
            "(*Dynamo*), in "
            f"turn: 15 runs, ResNet-50 9; {_QUARTILES}.",
            steps.steps,
            notes="Through both frontends",
        ),
        Section(
            "What choosing costs",
            ["selection.json"],
            "python benchmarks/selection.py",
            f"All selections of a forward by themselves, beside the whole step; TopK at ratio 0.5; {_QUARTILES}.",
            steps.selection,
            notes="What choosing costs",
        ),
        Section(
            "Rules side by side",
            ["peers.json"],
            "python benchmarks/peers.py --compile --memory",
            f"One training step by the rules of several systems, all at ratio 0.5, in turn, 15 runs; {_QUARTILES}. "
            "Equal ratios are "
            "not equal errors: this says what a step costs, not what it is worth.",
            steps.steps,
            notes="Rules side by side",
        ),
        Section(
            "Single products: where sampling pays",
            ["ops.json"],
            "python benchmarks/ops.py --batch 8 --runs 7 --ratios 0.25 0.5 --json ops.json --figure roofline-cpu.png",
            "Products by themselves, eager (oneDNN), float32, by a given selection. Exact / this, medians of 7 "
            "runs, of these the "
            "median over the layers of a network; in parentheses how many of its layers get faster. The quartiles "
            "of each product "
            "stand in the records.",
            steps.products,
            notes="Single products: where sampling pays",
            picture="../figures/roofline-cpu.png",
        ),
        Section(
            "Sampled gradients of one layer: time",
            ["roles.json", "roles-compiled.json"],
            "python benchmarks/roles.py\npython benchmarks/roles.py --compile",
            "Forward and backward of one layer, ratio 0.5, float32; exact layer and variants in turn, 20 pairs of "
            "steps; "
            f"{_QUARTILES}. With both gradients at one half the limit is 1.5.",
            steps.roles,
            notes="Sampled gradients of one layer: time",
        ),
        Section(
            "Sampled gradients: memory",
            ["memory.json"],
            "python benchmarks/memory.py",
            "Four blocks of a ViT-B (768 features, 12 heads, 197 tokens, batch 32, float32), ratio 0.3. Bytes are "
            "counted, and the "
            "same in each run. Shares of exact in parentheses.",
            steps.memory,
            notes="Sampled gradients: memory",
        ),
        Section(
            "Steps with some of the tokens",
            ["tokens.json"],
            "python benchmarks/tokens.py --models vit_b_16 --first 0 --compiled-only --optimizers none adamw --runs "
            "5 --warmup 1\n"
            "python benchmarks/tokens.py --models vit_b_16 --batch 8 --first 0 --compiled-only --optimizers none "
            "--runs 5 --warmup 1\n"
            "python benchmarks/tokens.py --models gpt --compiled-only --optimizers none adamw --runs 5 --warmup 1\n"
            "python benchmarks/tokens.py --models bert --first 0 --variants tokens --compiled-only --optimizers "
            "none adamw --runs 4 "
            "--warmup 1\n"
            "python benchmarks/tokens.py --models vit_b_16 --batch 16 --memory --variants tokens --first 0 1 "
            "--optimizers adamw",
            "Half of the tokens; *both*: half of the channels as well; *first*: blocks that compute all tokens. 5 "
            "runs in turn (BERT "
            f"4); {_QUARTILES}. The runs of the eager rows are not on record.",
            steps.tokens,
        ),
    ],
)

GPU = Page(
    "gpu.md",
    "On a GPU",
    "One GPU was used for a quarter of an hour.",
    [
        Section(
            "Training steps on a GPU",
            ["gpu/wrn-28-10.json", "gpu/vit-b-16.json", "gpu/gated-mlp.json"],
            f"{_STEP} --models wrn_28_10 --batch 256 --device cuda --autocast bfloat16 --channels-last \\\n"
            "    --compiled-only --no-swap --memory --profile\n"
            f"{_STEP} --models vit_b_16 --batch 256 --device cuda --autocast bfloat16 \\\n"
            "    --compiled-only --no-swap --scopes value --memory --profile\n"
            f"{_STEP} --models gated_mlp --batch 16384 --dtype bfloat16 --device cuda \\\n"
            "    --compiled-only --no-swap --backward --scopes value --memory --profile",
            "bfloat16, batch 256 (16,384 tokens), ratio 0.5, 11 steps of each variant in turn, everything "
            f"compiled; {_QUARTILES}. The number of steps was "
            "noted beside the records.",
            steps.steps,
            notes="On a GPU",
        ),
        Section(
            "Products on a GPU",
            ["gpu/kernels.json"],
            "python benchmarks/kernels.py",
            f"bfloat16, 15 calls in turn; {_QUARTILES}. The Triton kernels and this benchmark were removed in 0.2 "
            "([kernels](../kernels.md)); the command is that of version 0.1.",
            steps.kernels,
        ),
    ],
)

POLICIES = Page(
    "policies.md",
    "Policies",
    "What policies predict, and what they gain.",
    [
        Section(
            "Predicted and measured times",
            ["predictions-eager.json"],
            "python benchmarks/predictions.py --json predictions-eager.json",
            "Speed-up of whole eager training steps with one ratio for all layers, value scope, weight scores: as "
            "measured in turn "
            "with the exact step, medians of 7 runs with quartiles, and as the cost models predict it; in "
            "parentheses how far that "
            "is from the median.",
            policies.predictions,
            notes="Predicted and measured times",
        ),
        Section(
            "Budgets against one ratio for all",
            ["budgets.json"],
            "python benchmarks/budgets.py --ratio 0.75 --json budgets.json",
            "Ten networks after 30 exact steps on scikit-learn's digits. Error: ‖ĝ − g‖² / ‖g‖² of the gradient by "
            "all parameters, mean "
            "over four batches, one run; in parentheses as a share of the one ratio's.",
            policies.budgets,
            notes="Budgets against one ratio for all",
        ),
        Section(
            "Auto",
            ["auto.json"],
            "python benchmarks/auto.py --size 128 --sweep --runs 7 --json auto.json",
            "The smallest network of each of torchvision's classification families, 128 × 128, eager. Exact / this "
            "in turn, medians of 7 "
            "runs with quartiles; and the best of six plans with one ratio for all layers, in the same turns.",
            policies.auto,
            notes="Auto",
        ),
    ],
)

TRAINING = Page(
    "training.md",
    "Experiments on real data",
    "Whole trainings, and their rivals of equal cost: exact training for fewer epochs, and of a narrower network. "
    "Accuracy is on the "
    "test set at the end, which was also used to choose ratios and rates where no section says otherwise. *To exact* "
    "is in points, to exact training at the same "
    "rate. Operations, times, memory and bytes are shares of exact training's. Times with quartiles are of steps in "
    "turn. Compiling "
    "is in no time, unless the section says so. A row of **one seed** says little below a "
    "point. The same rows "
    "with all columns, and figures: [tables](experiments/tables.md).",
    [
        _trained("MNIST: a CNN", "mnist-cnn", "mnist-cnn", "Experiments on real data"),
        _trained("MNIST: an MLP", "mnist-mlp-86a2a78acc4f", "mnist-mlp", "The MLP on MNIST"),
        _trained(
            "MNIST: an MLP, Bernoulli-CRS beside dropout",
            "mnist-mlp-dropout",
            "mnist-mlp-dropout",
            "The MLP on MNIST",
            "Each has four tries, compared on 5,000 of the images; the test set was asked once a run. The rates of "
            "equal noise are those of `python examples/experiments/equal_noise.py "
            "examples/experiments/configs/mnist-mlp.toml --data FOLDER`: 0.203 at fc1, 0.359 at fc2.",
        ),
        _trained("MNIST: an MLP, of the first day", "mnist-mlp-14eb6fb90aa0", "mnist-mlp", "The MLP on MNIST"),
        _trained("CIFAR-10: WRN-10-2, ten epochs", "cifar-wrn10-2", "cifar-wrn10-2", "CIFAR-10 from scratch"),
        _trained("CIFAR-10: WRN-10-4, six epochs", "cifar-wrn10-4", "cifar-wrn10-4", "CIFAR-10 from scratch"),
        _trained(
            "CIFAR-10: WRN-10-2, six epochs, trapezoid",
            "cifar-wrn10-2-trapezoid",
            "cifar-wrn10-2-trapezoid",
            "CIFAR-10 from scratch",
        ),
        _trained(
            "What brings sampling closer to the front",
            "cifar-wrn10-2-tries",
            "cifar-wrn10-2-tries",
            "What brings sampling closer to the front",
        ),
        Section(
            "The learning rate",
            [],
            "python benchmarks/pages.py",
            "Accuracy by learning rate, in multiples of the configured one; in brackets the seeds. The runs are "
            "those of the other "
            "sections of this page, and have their commands and machines.",
            training.rates,
            lambda: "Machines, versions and dates are those of the runs.",
            "The learning rate",
        ),
        _trained(
            "Fine-tuning: WRN-10-2", "fashion-wrn10-2-finetune-99c986bc6990", "fashion-wrn10-2-finetune", "Fine-tuning"
        ),
        _trained(
            "Fine-tuning: WRN-10-2, each seed from a start of its own",
            "fashion-wrn10-2-finetune-2457ed4f7f57",
            "fashion-wrn10-2-finetune",
            "Fine-tuning",
        ),
        _trained(
            "Fine-tuning by phases",
            "fashion-wrn10-2-phases",
            "fashion-wrn10-2-phases",
            "Fine-tuning by phases",
            "Seconds have in all that compiles and cuts networks out. The network that it begins with was trained "
            "for two epochs "
            "(`cifar-wrn10-2.toml --autocast bfloat16 --only exact --seeds 2 --set training.epochs=2`). Exact "
            "training has one seed.",
        ),
        _trained(
            "Fine-tuning by phases: MiniLM", "debian-minilm-phases", "debian-minilm-phases", "Fine-tuning by phases"
        ),
        _trained(
            "Fine-tuning by phases: rates chosen on held-out examples, five starts",
            "fashion-wrn10-2-protocol",
            "fashion-wrn10-2-protocol",
            "Fine-tuning by phases",
            "Accuracy is mean ± standard deviation over five networks to begin with, which `cifar-wrn10-2-short.toml "
            "--autocast bfloat16` trains. The test set was asked once for each run. Seconds have in all that "
            "transforms and cuts networks out.",
        ),
        _trained("The network that the small ViT begins with", "cifar-vit-small", "cifar-vit-small", "Fine-tuning"),
        _trained(
            "Fine-tuning: a small ViT",
            "fashion-vit-small-finetune",
            "fashion-vit-small-finetune",
            "Fine-tuned transformers",
        ),
        _trained(
            "Fine-tuning: MiniLM, sections of Debian", "debian-minilm", "debian-minilm", "Fine-tuned transformers"
        ),
        _trained("Fine-tuning: MiniLM, who speaks", "speakers-minilm", "speakers-minilm", "Fine-tuned transformers"),
        _trained("A GPT from scratch", "shakespeare-gpt", "shakespeare-gpt", "A GPT from scratch"),
        _trained(
            "A GPT from scratch, two epochs", "shakespeare-gpt-short", "shakespeare-gpt-short", "A GPT from scratch"
        ),
        _trained(
            "The ImageNet path: ResNet-50",
            "imagenette-resnet50",
            "imagenette-resnet50",
            "The ImageNet path",
            "One run of 50 steps each, too short to be about accuracy: mean losses of the first and the last ten "
            "steps.",
        ),
        _trained(
            "The ImageNet path: ResNet-152",
            "imagenette-resnet152",
            "imagenette-resnet152",
            "The ImageNet path",
            "One run of 50 steps each, as ResNet-50.",
        ),
        Section(
            "Demand-driven sampling: accuracy",
            ["demand-accuracy.jsonl"],
            "python benchmarks/demand_accuracy.py --data DIR --limit 2500 --depth 16 --epochs 9 \\\n"
            '    --settings exact "value, stale" '
            '"value, stale, not hoisted" "group, stale" "value, stale, tail" "group, stale, tail" \\\n'
            "    --json-lines FILE",
            "WRN-16-2 on 2,500 images of Fashion-MNIST (2,500 test images), 9 epochs of one-cycle SGD, TopK at "
            "ratio 0.5; mean ± standard "
            "deviation of 3 seeds, as trained and after re-estimating the BatchNorm statistics. *Tail*: the last 3 "
            "epochs exact.",
            policies.demand_accuracy,
            _no_machine,
            "Demand-driven sampling: accuracy",
        ),
        *([_DEMO] if demo.RECORDS else []),
    ],
)

TOKENS = Page(
    "tokens-and-examples.md",
    "Tokens, and examples that are drawn",
    "Short trainings of small networks that leave out tokens, or read some of the examples: a sign of which way it "
    "goes, no more. "
    "Columns as in [experiments on real data](training.md); attention is counted in all of the operations here.",
    [
        _trained("A ViT from scratch", "cifar-vit-tokens", "cifar-vit-tokens", "Tokens, and examples that are drawn"),
        _trained(
            "A ViT with overlapping patches, from scratch",
            "cifar-vit-stem-tokens",
            "cifar-vit-stem-tokens",
            "Tokens, and examples that are drawn",
        ),
        _trained(
            "A ViT, fine-tuned",
            "fashion-vit-tokens-finetune",
            "fashion-vit-tokens-finetune",
            "Tokens, and examples that are drawn",
        ),
        _trained(
            "A ViT, fine-tuned: rates chosen on held-out examples, five starts",
            "fashion-vit-tokens-protocol",
            "fashion-vit-tokens-protocol",
            "Tokens, and examples that are drawn",
            "Accuracy is mean ± standard deviation over five networks to begin with, which "
            "`cifar-vit-tokens.toml --only exact --seeds 0 1 2 3 4 100` trains. The test set was asked once for "
            "each run.",
        ),
        _trained(
            "MiniLM, who speaks",
            "speakers-minilm-tokens",
            "speakers-minilm-tokens",
            "Tokens, and examples that are drawn",
        ),
        _trained(
            "MiniLM, sections of Debian",
            "debian-minilm-tokens",
            "debian-minilm-tokens",
            "Tokens, and examples that are drawn",
        ),
        _trained(
            "A GPT from scratch",
            "shakespeare-gpt-tokens",
            "shakespeare-gpt-tokens",
            "Tokens, and examples that are drawn",
        ),
        _trained(
            "A CNN, examples drawn",
            "fashion-cnn-examples",
            "fashion-cnn-examples",
            "Tokens, and examples that are drawn",
        ),
    ],
)

NETWORK = Page(
    "network.md",
    "Data-parallel training over a network",
    "Hosts are network namespaces on one machine, each behind a token bucket; computing is waited for, all else is "
    "real.",
    [
        Section(
            "Steps over a network",
            ["multinode.json"],
            "python benchmarks/multinode.py --networks wrn_28_10 --hosts 2 --runs 5 --json wrn2.json\n"
            "python benchmarks/multinode.py --networks resnet50 --hosts 2 --runs 5 --json r50.json\n"
            "python benchmarks/multinode.py --networks wrn_28_10 --hosts 4 --runs 3 --json wrn4.json\n"
            "python benchmarks/multinode.py --networks resnet152 --hosts 2 --runs 3 --json r152.json\n"
            "python benchmarks/multinode.py --from-json wrn2.json r50.json wrn4.json r152.json --json "
            "docs/results/multinode.json",
            "As root. Dense / this by neighbouring steps, medians, quartiles in brackets; 5 or 3 runs. Computing is "
            "equal for all, except in "
            "the last column. *Stale*: `ema` scores, as they were called.",
            network.times,
            network.machines,
            "Data-parallel training over a network",
        ),
        Section(
            "Bytes and processor time of a step",
            ["multinode.json"],
            "python benchmarks/multinode.py --from-json docs/results/multinode.json",
            "Medians of the steps. Bytes that the interface of a host counted, and how many more than the report "
            "says; processor time at "
            "1 Gb/s; what the model on paper says more than was measured, at 100 Mb/s, 1 and 10 Gb/s.",
            network.sent,
            network.machines,
            "Data-parallel training over a network",
        ),
        Section(
            "Many workers, on paper",
            ["multinode.json"],
            "python benchmarks/multinode.py --from-json docs/results/multinode.json",
            "By the model of `benchmarks/_network_model.py` and the links as measured: ring / halving-doubling; "
            "seconds of the dense step, "
            "then dense / this. A prediction: nothing of it was measured.",
            network.paper,
            network.machines,
            "Data-parallel training over a network",
        ),
        Section(
            "Bytes of gradients, as planned",
            ["multinode-bytes.json"],
            "python benchmarks/multinode.py --bytes-only",
            "Gradients of a step, dense and by the plan; counted, the same in each run. *Not demanded* samples "
            "inputs only.",
            network.bytes_of,
        ),
    ],
)

PAGES = (TRAINING, TOKENS, STEPS, GPU, POLICIES, NETWORK)

OWN = {
    "Experiments, all columns and figures": ("experiments/tables.md", "made by `examples/experiments/tables.py`."),
    "Many architectures, and whether they are right": ("model-zoo.md", "made by `benchmarks/model_zoo.py`."),
    "Subnetworks: time": (
        "subnetworks.md",
        "whole training steps of physically narrow networks, by `benchmarks/subnetworks.py`.",
    ),
    "Subnetworks: memory": ("subnetwork-memory.md", "peak memory of a step, by `benchmarks/subnetwork_memory.py`."),
    "Subnetworks: which models": (
        "subnetwork-coverage.md",
        "beside Torch-Pruning, by `benchmarks/subnetwork_coverage.py`.",
    ),
    "Errors of the estimators": (
        "../estimators.md#comparison-with-other-methods",
        "against operations and time, by `benchmarks/estimators.py`; records: "
        "[estimators.json](results/estimators.json).",
    ),
}
"""Pages that other scripts write: title, file in docs/results, what it is."""

WRITTEN = (
    "The demo",
    "Operations saved on known networks",
    "Time of the transform",
    "The ViT block, counted with fused attention, and at a batch of 32",
    "On the way to the gathers of ResNet-50",
    "Tests on a GPU",
    "Single looks",
)
"""Headings of older.md."""
