"""The nine protocols as data: every question, arm, control, threshold and allowed difference stands here alone.

Fixed before the runs that count; docs/claims.md is made from it (``protocol``). Not here: how a figure is measured.
"""

from __future__ import annotations

from collections.abc import Mapping

from twofold.recipes.claims.record import Arm, Difference, Protocol, Rule, Shown

ITEMS_PER_FAMILY, MIXED_ITEMS, PER_PATTERN, PER_SKILL, PER_TOOL = (
    80,
    240,
    60,
    160,
    80,
)  # the battery's sizes, which a test compares with the recipe's
_START = "the earlier stage is where the later one starts; what it saw on top is the thing that is tested"
OWN_START: Mapping[Difference, str] = dict.fromkeys(("forms", "tokens", "flops", "labels", "tuning"), _START)
_SAMPLING = (
    "the arms get equal operations instead: sampling a token costs a third of training on one, so that an arm that "
    "samples a lot handles more tokens"
)
_EACH = f"{ITEMS_PER_FAMILY} items a family"
_HARD = "the families that need steps (sum, swap, run, least, top)"
_MIXED = (
    "run and least with mixed signs and up to eight entries (texts show one sign and up to six), for which no solver "
    "trace exists at any stage"
)

THINKING_GAIN = Protocol(
    key="thinking_gain",
    title="Thinking pays",
    question="Does thinking before the answer solve tasks that a direct answer does not?",
    arms=(
        Arm("cold_start", "SFT on thoughts with their answers", "eval_cold_start/items/think"),
        Arm("direct", "control: SFT on the same queries, answers alone", "eval_direct/items/direct"),
        Arm("general_rl", "the finished model, asked in both modes", "eval_final/items/think"),
    ),
    control="The same base and the same queries, trained to answer at once, with at least as many tokens. This base "
    "saw worked steps in most task documents of its pre-training: both arms start from a model that knows the steps, "
    "and neither is one that never met them. Beside it the finished model against its own hard switch: the same "
    "weights.",
    items=f"{_HARD}, at the sizes of training; {_EACH}; T = 0.6, two samples an item thinking, one directly.",
    rules=(
        Rule("control", "cold start, thinking, minus the direct-only control", 30, "at least"),
        Rule("own_switch", "finished model, thinking, minus its own hard switch", 30, "at least"),
        Rule("tokens", "the control trained on at least as many tokens", 1, "exact", ""),
    ),
    refuted="A gain under 30 points against either.",
    comparisons=(("cold_start", "direct"),),
    allowed_differences={
        ("cold_start", "direct"): {
            "labels": "thoughts against answers alone is the thing that is tested",
            "tokens": "the control may train on more, which helps it; a condition asks that it has no fewer",
            "flops": "as for the tokens; the cold start also samples direct answers in order to drop easy queries",
        }
    },
)

BOTH_MODES = Protocol(
    key="both_modes",
    title="One model, two modes",
    question="Is one model good in both modes, and does fusing them cost little of the thinking?",
    arms=(
        Arm("general_rl", "the finished model", "eval_final/items/think"),
        Arm("fusion", "both modes in one model", "eval_fusion/items/think"),
        Arm(
            "think_only",
            "control: the same thinking responses alone, from the same start, as many tokens",
            "eval_think_only/items/think",
        ),
    ),
    control="SFT on fusion's own thinking responses alone, fresh ones among them, for as many trained tokens: without "
    "it the cost of fusing cannot be told from the gain of more SFT.",
    items=f"Thinking: {_HARD}, at the sizes of training, and for the cost also {_MIXED}; two samples an item. Direct "
    f"answers under /no_think: max, min, last, one sample. {_EACH}; T = 0.6. The worst family is judged for the two "
    "levels, the mean over families for the cost.",
    rules=(
        Rule("thinking", "finished model, worst family that needs steps, thinking", 75, "level", "%"),
        Rule("direct", "finished model, worst easy family, /no_think", 80, "level", "%"),
        Rule("fusion_cost", "fusion minus the thinking-only control, thinking", -4, "at least"),
        Rule("fusion_cost_mixed", "fusion minus the thinking-only control, thinking, mixed signs", -4, "at least"),
    ),
    refuted="One family under its level, or a loss by fusing that may be larger than 4 points, with mixed "
    "signs or without.",
    comparisons=(("fusion", "think_only"),),
    allowed_differences={
        ("fusion", "think_only"): {
            "forms": "thinking alone, without the other mode's forms, is what the control is",
            "labels": "the control has no direct answers; its thinking responses are fusion's own",
        }
    },
)

RL_GAIN = Protocol(
    key="rl_gain",
    title="Reasoning RL helps",
    question="Does RL with a verifier add something where no traces exist that one round of rejection sampling and "
    "more traces do not add?",
    arms=(
        Arm("cold_start", "where all three arms start", "eval_cold_start/items/mixed"),
        Arm("rl", "RL with a verifier on mixed queries", "eval_rl/items/mixed"),
        Arm(
            "rl_rejection",
            "control: SFT on own samples that the same verifier kept, same queries, half and half with solver traces",
            "eval_rl_rejection/items/mixed",
        ),
        Arm(
            "rl_more_sft",
            "control: more SFT on the traces there are (pure signs and the other families)",
            "eval_rl_more_sft/items/mixed",
        ),
    ),
    control="Two, at the operations of RL, sampling counted: SFT on own right samples, which uses the same verifier "
    "without policy gradients, in one round, and more SFT on traces. Against more SFT and against the start each "
    "family is held by itself and the worse one counts; against rejection sampling both count together, as one round "
    "of it goes part of the same way. What RL makes the model forget is judged too.",
    items=f"{_MIXED}; they differ from texts in their signs and, above six entries, in their length, and the claim "
    f"does not tell the two apart. {MIXED_ITEMS} items a family, {ITEMS_PER_FAMILY} at T = 1; no flag; two samples an "
    "item at T = 0.6, one greedy, eight at T = 1. “Beyond” are sizes that no stage trains at all. Forgetting: "
    f"{_HARD}, as shown in text, {_EACH}, two samples an item at T = 0.6.",
    rules=(
        Rule("more_sft", "RL minus more SFT, worse family, T = 0.6", 0, "above"),
        Rule("rejection", "RL minus rejection-sampling SFT on the same queries, both families, T = 0.6", 0, "above"),
        Rule("greedy", "RL minus the cold start, worse family, greedy", 0, "above"),
        Rule("forgetting", "RL minus the cold start, families as shown in text", -5, "at least"),
    ),
    shown=(
        Shown("pooled_more_sft", "RL minus more SFT, both families, T = 0.6"),
        Shown("worse_rejection", "RL minus rejection-sampling SFT on the same queries, worse family, T = 0.6"),
        Shown("pooled_greedy", "RL minus the cold start, both families, greedy"),
        Shown("hot_more_sft", "RL minus more SFT, T = 1"),
        Shown("hot_rejection", "RL minus rejection-sampling SFT, T = 1"),
        Shown("hot_start", "RL minus the cold start, T = 1"),
        Shown("pass_start", "pass@8 of the cold start, T = 1", "%"),
        Shown("pass_rl", "pass@8 of RL, T = 1", "%"),
        Shown("pass_rejection", "pass@8 of rejection-sampling SFT, T = 1", "%"),
        Shown("pass_more_sft", "pass@8 of more SFT, T = 1", "%"),
        Shown("beyond", "RL minus the cold start, sizes beyond all training"),
        Shown("beyond_rejection", "RL minus rejection-sampling SFT, sizes beyond all training"),
        Shown("beyond_more_sft", "RL minus more SFT, sizes beyond all training"),
    ),
    refuted="Either control level with RL on one family with mixed signs, no gain in greedy decoding on one, or a loss "
    "that may be larger than 5 points on what the cold start could do.",
    comparisons=(("rl", "rl_more_sft"), ("rl", "rl_rejection"), ("rl", "cold_start")),
    allowed_differences={
        ("rl", "rl_more_sft"): {
            "labels": "a verifier where there are no traces, against the traces there are, is the thing that is tested",
            "tokens": _SAMPLING,
        },
        ("rl", "rl_rejection"): {
            "labels": "the same verifier: RL learns from every verdict, SFT from the samples that it kept",
            "tokens": _SAMPLING,
        },
        ("rl", "cold_start"): OWN_START,
    },
)

MODE_FOLLOWING = Protocol(
    key="mode_following",
    title="The switch works",
    question="Does the model reply in the mode that the last flag asks for, also in conversations it never trained on?",
    arms=(Arm("general_rl", "the finished model", "eval_final/items/modes"),),
    control="Eight flag patterns that no stage trains on, one of one turn and seven of two to four: “conflict, last "
    "/think”, “three turns”, “off, kept for two turns”, “on again, then kept”, “off again, then kept”, “on again after "
    "a pause”, “four turns”, “system /no_think, then kept”. Training has named patterns and random flags over one to "
    "four turns, never these. The worst pattern of either sort is judged, not only the mean. The "
    "hard switch fills in the empty thought itself; it is shown and not counted.",
    items=f"Conversations in every flag pattern, {PER_PATTERN} of each; one sample at T = 0.6.",
    rules=(
        Rule("worst", "worst trained pattern", 90, "level", "%"),
        Rule("held_out", "worst of the eight held-out patterns", 80, "level", "%"),
        Rule("held_out_mean", "the eight held-out patterns together", 90, "at least", "%"),
    ),
    shown=(Shown("hard_switch", "hard switch", "%"),),
    refuted="One trained pattern under 90 %, one held-out pattern under 80 %, or held-out patterns that may be under "
    "90 % together.",
)

GENERAL_RL = Protocol(
    key="general_rl",
    title="General RL teaches new things",
    question="Does general RL teach skills that the model did not have, and more than 24 solved examples do?",
    arms=(
        Arm("fusion", "before: where both arms start", "eval_fusion/items/general"),
        Arm("general_rl", "RL over many kinds of tasks", "eval_final/items/general"),
        Arm("general_sft_24", "control: SFT on 24 solved examples of the skills", "eval_general_sft_24/items/general"),
        Arm(
            "general_sft_240",
            "shown: SFT on 240 solved examples of the skills",
            "eval_general_sft_240/items/general",
        ),
    ),
    control="SFT on 24 solved examples of the same skills, with replay: the cheap way to teach a format. Its rate and "
    "number of steps were tuned, as were those of SFT on 240, which is shown. All seven skills count, the worst too, "
    "and a condition asks that none was there before. RL is not free of labels: styles are rewarded by rule and right "
    "answer, orders by similarity to a reference, which is a label of a kind.",
    items="Seven skills: five styles of an answer (chance 1 in 5), two orders of four letters (chance 1 in 24). "
    f"{PER_SKILL} items of each and {PER_TOOL} of tool use, the same before and after; one sample at T = 0.6. A "
    "skill gains what it has after above the larger of before and chance: to rise to chance is no gain. "
    "Before, the mean is judged: a form that the model prefers whatever it is asked for leads in one skill and lacks "
    "in the others.",
    rules=(
        Rule("gain", "mean gain over the seven skills, above chance", 20, "at least"),
        Rule("absent", "before: mean lead of the seven skills over chance", 10, "at most"),
        Rule("smallest", "smallest gain of a skill, above chance", 0, "above"),
        Rule("sft_24", "mean over the skills minus SFT on 24 examples", 0, "above"),
        Rule("thinking", "thinking lost on families that need steps", 3, "at most"),
        Rule("tool", "tool use after", 60, "level", "%"),
    ),
    shown=(
        Shown("largest_lead", "before: largest lead of a skill over chance"),
        Shown("sft_240", "mean over the skills minus SFT on 240 examples"),
        Shown("tool_gain", "gain in tool use"),
    ),
    refuted="A skill that was there before, a skill that did not gain, 24 examples that do as well, lost thinking, or "
    "a tool that is not used.",
    comparisons=(("general_rl", "fusion"), ("general_rl", "general_sft_24")),
    allowed_differences={
        ("general_rl", "fusion"): OWN_START,
        ("general_rl", "general_sft_24"): {
            "labels": "rewards on own samples against solved examples is the thing that is tested",
            "forms": "RL also practises tools, thinking and other flags; both arms meet the skills in the same forms",
            "tokens": "24 examples bear few passes; their number of steps is chosen on the tuning seeds",
            "flops": "as for the tokens: the claim is about what can be learnt, not about what it costs",
        },
    },
)

THINKING_BUDGET = Protocol(
    key="thinking_budget",
    title="The thinking budget works",
    question="Is the budget kept, and is an answer after a thought that was stopped worth more than one without a "
    "thought?",
    arms=(
        Arm("general_rl", "the finished model", "eval_final/scores/budget"),
        Arm("fusion", "trained with thoughts that were cut and then answered", "eval_fusion/scores/budget"),
        Arm("uncut", "control: the same fusion without cut thoughts", "eval_uncut/scores/budget"),
    ),
    control="Only replies that were stopped count: accuracy over all replies rises with the budget because short "
    "thoughts finish. They are held against the same items without a thought, against chance, and against a model that "
    "never saw a cut thought.",
    items="top alone: there part of the steps is worth something, and the place of the stop depends on the number of "
    f"entries alone, not on the answer; {_EACH}, the same at every budget; one sample at T = 0.6. For "
    "each item the budgets at which it was stopped are averaged; items never stopped do not count. "
    "The last comparison takes items stopped in both models at the same budget.",
    rules=(
        Rule("over_none", "stopped replies minus the same items without a thought", 0, "above"),
        Rule("over_chance", "stopped replies minus chance", 0, "above"),
        Rule("over_uncut", "stopped replies of fusion minus those without cut thoughts in training", 0, "above"),
        Rule("kept", "no reply thinks beyond its budget", 1, "exact", ""),
    ),
    shown=(
        Shown("rank", "rank correlation of budget and accuracy, all replies", ""),
        Shown("stopped_share", "replies that were stopped, budgets above 0", "%"),
    ),
    refuted="Stopped replies no better than no thought, than chance, or than without training for it; or one reply "
    "over its budget.",
    comparisons=(("fusion", "uncut"),),
    allowed_differences={("fusion", "uncut"): {"forms": "prompts with a cut thought are the thing that is tested"}},
)

DISTILLATION = Protocol(
    key="distillation",
    title="Distilling beats RL on a small model",
    question="At equal operations, and given a finished teacher, whose own training is not counted, does a small model "
    "learn more from the teacher's distribution on its own samples than from RL, and than from the teacher's texts?",
    arms=(
        Arm("student_sft", "where all three arms start", "eval_student_sft/items/hot"),
        Arm("student_opd", "on-policy distillation", "eval_student_opd/items/hot"),
        Arm("student_rl", "control: RL with a verifier", "eval_student_rl/items/hot"),
        Arm("student_more_sft", "control: more SFT on texts of the teacher", "eval_student_more_sft/items/hot"),
    ),
    control="RL on the same queries in the same prompt forms for the same operations, what the teacher scores "
    "and writes counted, what it took to train it not; and SFT on texts of the same teacher. The "
    "queries are those of which RL can learn: solved now and then.",
    items="Three parts, whose means are averaged: families as shown in text and mixed signs, both without a flag, "
    f"and mixed signs with /think. {_EACH}; eight samples an item at T = 1. Shown at T = 0.6: mixed signs, no flag, "
    "two samples an item.",
    rules=(
        Rule("over_rl", "distillation minus RL, pass@1", 0, "above"),
        Rule("over_sft", "distillation minus more SFT, pass@1", 0, "above"),
        Rule("pass_k", "distillation minus RL, pass@8", 0, "above"),
        Rule("operations", "operations of the three arms within 10 % of each other", 1, "exact", ""),
    ),
    shown=(
        Shown("pass_k_sft", "distillation minus more SFT, pass@8"),
        Shown("start", "distillation minus the common start, pass@1"),
        Shown("no_flag_pure", "distillation minus RL, pass@1, families as shown in text, no flag"),
        Shown("no_flag_mixed", "distillation minus RL, pass@1, mixed signs, no flag"),
        Shown("flag_mixed", "distillation minus RL, pass@1, mixed signs, /think"),
        Shown("cool_rl", "distillation minus RL, mixed signs, no flag, T = 0.6"),
        Shown("cool_sft", "distillation minus more SFT, mixed signs, no flag, T = 0.6"),
    ),
    refuted="RL or more SFT level with distillation in pass@1, or RL level with it in pass@8.",
    comparisons=(("student_opd", "student_rl"), ("student_opd", "student_more_sft")),
    allowed_differences={
        ("student_opd", "student_rl"): {
            "labels": "a teacher's distribution against a verifier is the thing that is tested",
            "tokens": _SAMPLING,
        },
        ("student_opd", "student_more_sft"): {
            "labels": "the teacher's distribution on own samples against its texts is the thing that is tested",
            "tokens": _SAMPLING,
            "tuning": "the opponent was tried at one rate more",
        },
    },
)

PRETRAINING = Protocol(
    key="pretraining",
    title="Later pre-training stages pay",
    question="Does each later stage of pre-training add what it is for, at a small cost elsewhere, against training on "
    "without it?",
    arms=(
        Arm("student_base", "stage 2: mostly tasks (0.74 of the tokens)", "student_base/result/tasks"),
        Arm(
            "student_base_general",
            "control: stage 1's shares go on (tasks 0.3), on fresh task text; same tokens, same decay",
            "student_base_general/result/tasks",
        ),
        Arm("s3", "stage 3: long context, new RoPE base", "s3/result/probe"),
        Arm("s3_old_base", "control: stage 3 with the old RoPE base", "s3_old_base/result/probe"),
        Arm("s2", "shown: where stage 3 starts", "s2/result/probe"),
    ),
    control="For stage 2 the shares of stage 1 continued, with as many tokens and the same decay of the learning rate. "
    "Its task text is fresh and from the very shard that stage 2 reads, so that stage 2 differs in the shares and not "
    "in whether its text is new. Stage 2 reads that shard from small sizes to large, the control, which stage 1 has "
    "led from small to large before, in no order. For stage 3 the same long training with the old RoPE base. What "
    "each costs on text inside the short context is judged too.",
    items="Stage 2: held-out items of all families in document format, greedy. Stage 3: windows of held-out "
    "text, bits per byte at the positions 512 to 1,024, and a probe that asks for letters from afar. The cost of both: "
    "bits per byte inside the first 256 tokens.",
    rules=(
        Rule("stage2_tasks", "stage 2 minus stage 1's shares continued, tasks", 0, "above"),
        Rule(
            "stage2_text",
            "stage 2 costs against stage 1's shares continued, text inside 256",
            0.3,
            "at most",
            "bits/byte",
        ),
        Rule("stage3_beyond", "stage 3 saves against the old base, 512 to 1,024", 0, "above", "bits/byte"),
        Rule("stage3_inside", "stage 3 costs against the old base, inside 256", 0.02, "at most", "bits/byte"),
        Rule("retrieval", "retrieval, stage 3 minus the old base", 0, "above"),
    ),
    shown=(
        Shown("stage3_between", "stage 3 saves against the old base, 256 to 512", "bits/byte"),
        Shown("retrieval_start", "retrieval, stage 3 minus stage 2"),
    ),
    refuted="Stage 1's shares as good on tasks, or a cost in text that may be above 0.3 bits per byte; the old base as "
    "good at 512 to 1,024 tokens or in retrieval, or a cost inside 256 that may be above 0.02 bits per byte.",
    comparisons=(("student_base", "student_base_general"), ("s3", "s3_old_base")),
)

MOE_BALANCE = Protocol(
    key="moe_balance",
    title="Global balance lets experts specialise between task families",
    question="Do experts specialise more between task families when balance is asked of the whole batch, not of every "
    "micro-batch?",
    arms=(
        Arm("moe_global", "balance loss over the whole batch"),
        Arm("moe_micro", "control: balance loss over each micro-batch"),
    ),
    control="The same loss, weight and data, taken over each micro-batch of mixed documents. Only distances between "
    "task families count; plain text is far from every task under either loss, and the distance with it is shown.",
    items="Held-out documents of every task family; the distance between two families is the total variation between "
    "their shares of experts, averaged over pairs and layers. Intervals of one run resample documents.",
    rules=(
        Rule("distance", "distance between task families, global minus micro-batch", 0, "above", ""),
        Rule("dead", "no expert is dead under the global loss", 1, "exact", ""),
    ),
    shown=(
        Shown("distance_text", "distance between families, text among them, global minus micro-batch", ""),
        Shown("load_global", "largest load of an expert, global (fair: 1)", ""),
        Shown("load_micro", "largest load of an expert, micro-batch (fair: 1)", ""),
        Shown("text", "text inside the context, global minus micro-batch", "bits/byte"),
    ),
    refuted="A distance that is not larger under the global loss, or a dead expert.",
    comparisons=(("moe_global", "moe_micro"),),
)

# What the finished model does first.
PROTOCOLS = {
    protocol.key: protocol
    for protocol in (
        THINKING_GAIN,
        BOTH_MODES,
        RL_GAIN,
        MODE_FOLLOWING,
        GENERAL_RL,
        THINKING_BUDGET,
        DISTILLATION,
        PRETRAINING,
        MOE_BALANCE,
    )
}
