"""Our DPO of a Talker against TRL's DPOTrainer on the same pairs, step by step.

TRL knows one code a token and text models only: a thin subclass feeds it our Talker's log-probabilities. What is
compared is what TRL makes of them: the loss, its reference, and where three steps of it lead.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from stock import MICRO, perturb
from support import tokenizer_folder
from torch import Tensor

from omni_train.data.contracts import Document
from omni_train.data.encode import collate
from omni_train.data.media_tokens import MediaGeometry
from omni_train.data.talker_sequence import SpeechFormat, SpeechTokens, talker_sequence
from omni_train.data.tokenizer import load_tokenizer
from omni_train.models.build import build_talker, talker_config
from omni_train.models.talker import Talker, ThinkerStates
from omni_train.objectives.dpo import counts, dpo_losses, sequence_log_probs, talker_dpo_losses

BETA, LR, STEPS, PAIRS = 0.3, 2e-3, 3, 3


def test_the_loss_by_hand():
    """Two pairs, worked out in float64."""
    chosen, rejected = torch.tensor([-10.0, -20.0]), torch.tensor([-12.0, -19.0])
    reference_chosen, reference_rejected = torch.tensor([-11.0, -20.5]), torch.tensor([-11.5, -21.0])
    losses, margins = dpo_losses(chosen, rejected, reference_chosen, reference_rejected, beta=0.5)
    expected = [0.5 * ((-10 + 12) - (-11 + 11.5)), 0.5 * ((-20 + 19) - (-20.5 + 21))]  # 0.75, -0.75
    assert margins.tolist() == pytest.approx(expected)
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-margin)) for margin in expected], abs=1e-7)


def test_a_sequence_s_log_probability_is_that_of_all_its_codes():
    output = {
        "losses": torch.tensor([1.0, 2.0, 4.0, 8.0]),  # one frame and an end; the other likewise
        "sequence": torch.tensor([0, 0, 1, 1]),
        "residual_losses": torch.tensor([[0.1, 0.2], [0.4, 0.8]]),
        "frame_sequence": torch.tensor([0, 1]),
    }
    assert sequence_log_probs(output, 2).tolist() == pytest.approx([-3.3, -13.2])


def new_talker() -> Talker:
    talker = build_talker(talker_config(MICRO, load_tokenizer(tokenizer_folder())), seed=0, embedding_std=0.5)
    perturb(talker)
    return Talker(talker)


def pairs():
    """(a pack of preference pairs, random states of a Thinker for it)."""
    rng, tokenizer = np.random.default_rng(0), load_tokenizer(tokenizer_folder())
    format = SpeechFormat(MICRO.talker, SpeechTokens.of(tokenizer), has_rejected=True)
    documents = []
    for number in range(PAIRS):
        text = f"<|im_start|>user\nsay {number}<|im_end|>\n<|im_start|>assistant\ncat {number}<|im_end|>\n"
        ids = np.array(tokenizer(text).input_ids)
        document = Document(str(number), "text", ids, np.full(len(ids), -100), np.tile(np.arange(len(ids)), (3, 1)))
        for _ in range(2):
            codes = rng.integers(0, 32, (4, int(rng.integers(14, 20))))
            document.speeches.append(talker_sequence(document, [], codes, "aiden", format, MediaGeometry()))
        documents.append(document)
    pack = collate(documents)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(pack.speech.num_tokens, MICRO.text.hidden_size, generator=generator)
    return pack, ThinkerStates(states, states[:0])


def our_steps(talker: Talker, sft_weight: float) -> tuple[list[float], list[float]]:
    """(losses, margins) of the steps, as the loop computes them: sums divided by counts."""
    pack, states = pairs()
    reference = copy.deepcopy(talker).requires_grad_(False)
    optimizer = torch.optim.AdamW(talker.parameters(), lr=LR, weight_decay=0.0)
    fractions, losses, margins = torch.full((2, 4), 0.25), [], []
    for _ in range(STEPS):
        output = talker(pack.speech, states)
        seen = talker_dpo_losses(
            output, reference(pack.speech, states), pack, "talker", fractions, 0.0, BETA, sft_weight
        )
        divisors = counts(pack)
        assert [term.name for term in seen.terms] == (["dpo", "sft", "router"] if sft_weight else ["dpo", "router"])
        loss = sum(term.weight * term.sum / divisors[term.per] for term in seen.terms)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        margins.append(float(seen.reported["dpo/margin"][0] / seen.reported["dpo/margin"][1]))
    return losses, margins


@pytest.mark.parametrize("sft_weight", [0.0, 0.5])
def test_three_steps_equal_trl(sft_weight, tmp_path):
    pytest.importorskip("trl", reason="TRL is needed for this comparison alone")
    losses, margins = our_steps(new_talker(), sft_weight)
    if not sft_weight:
        assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[2] < losses[1] < losses[0] - 0.01
    theirs, their_margins = trl_steps(new_talker(), tmp_path, sft_weight)
    assert losses == pytest.approx(theirs, abs=1e-5)
    assert margins == pytest.approx(their_margins, abs=1e-4)


def trl_steps(talker: Talker, folder, sft_weight: float) -> tuple[list[float], list[float]]:
    """(losses, margins) of TRL's DPOTrainer, policy and reference being stock Talkers that we call through ours."""
    from datasets import Dataset as Rows
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.utils import FusedCausalLMOutput

    pack, states = pairs()
    sequences = [*range(0, 2 * PAIRS, 2), *range(1, 2 * PAIRS, 2)]  # TRL wants all chosen ones first
    num_groups = MICRO.talker.num_code_groups
    width = int(pack.speech.code_lengths.max()) * num_groups + 1
    seen: list[Tensor] = []

    def speaks(wrapper: Talker):
        def forward(input_ids: Tensor, **_):
            output = wrapper(pack.speech, states)
            rows = torch.zeros(2 * PAIRS, width)
            for row, number in enumerate(sequences):
                codes = output["losses"][output["sequence"] == number]
                residuals = output["residual_losses"][output["frame_sequence"] == number].flatten()
                rows[row, : len(codes) + len(residuals)] = -torch.cat([codes, residuals])
            nothing = torch.zeros_like(rows)
            fields = dict.fromkeys(FusedCausalLMOutput.__dataclass_fields__)
            fields |= {"log_probs": rows, "entropy": nothing, "mean_logits": nothing, "is_top1": nothing.bool()}
            return FusedCausalLMOutput(**fields)

        return forward

    class TalkerDPO(DPOTrainer):
        def _prepare_dataset(self, dataset, *args):
            return dataset

        def _set_signature_columns_if_needed(self):
            self._signature_columns = ["row"]

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            seen.append(loss.detach())
            return loss

    def collator(rows):
        ids = torch.zeros(2 * PAIRS, width + 1, dtype=torch.long)
        lengths = torch.tensor([int(pack.speech.code_lengths[number]) * num_groups + 1 for number in sequences])
        is_code = (torch.arange(width + 1) - 1 < lengths[:, None]).long() * (torch.arange(width + 1) > 0)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": is_code}

    reference = copy.deepcopy(talker)
    trainer = TalkerDPO(
        model=talker.talker,
        ref_model=reference.talker,
        args=DPOConfig(
            output_dir=str(folder), beta=BETA, learning_rate=LR, max_steps=STEPS, per_device_train_batch_size=PAIRS,
            lr_scheduler_type="constant", max_grad_norm=0.0, weight_decay=0.0, optim="adamw_torch", use_cpu=True,
            logging_steps=1, report_to=[], save_strategy="no", bf16=False, gradient_checkpointing=False,
            router_aux_loss_coef=0.0, disable_dropout=True,
            **({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, sft_weight]} if sft_weight else {}),
        ),
        train_dataset=Rows.from_dict({"row": list(range(PAIRS))}),
        data_collator=collator,
        processing_class=load_tokenizer(tokenizer_folder()),
    )  # fmt: skip
    trainer.model.forward, trainer.ref_model.forward = speaks(talker), speaks(reference)
    trainer.train()
    margins = [record["rewards/margins"] for record in trainer.state.log_history if "rewards/margins" in record]
    return [float(loss) for loss in seen], margins
