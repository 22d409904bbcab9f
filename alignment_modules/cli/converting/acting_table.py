"""TRL's options of methods that learn from their own samples, and ours."""

from __future__ import annotations

from alignment_modules.cli.converting import values
from alignment_modules.cli.converting.row import Row, Section, nothing, refusal
from alignment_modules.cli.converting.values import of_loss, same, unless, where

ACTING = ("grpo", "rloo")

SAMPLED = (
    Section(
        "GRPO and RLOO",
        ACTING,
        (
            Row("num_generations", "model.num_generations", values.count),
            Row(
                "per_device_train_batch_size",
                "data.batch_size model.micro_batch_size",
                lambda value, given: (values.prompts(value, given), value),
                "completions of a micro-batch in TRL; here prompts of a rollout, that is completions of a micro-batch "
                "times `steps_per_generation`, divided by `num_generations`",
            ),
            Row("gradient_accumulation_steps", "", values.count, note="follows from the two sizes above"),
            Row(
                "steps_per_generation",
                "model.minibatches",
                values.minibatches,
                "micro-batches of a rollout in TRL; here optimizer steps in a pass over it, each of whole groups",
            ),
            refusal("generation_batch_size", None, "depends on the processes: give steps_per_generation"),
            Row("num_iterations", "model.num_iterations", same),
            Row("max_grad_norm", "model.max_grad_norm", values.clipping),
            Row(
                "beta", "model.beta", same, "the reference is a copy of the policy; TRL reads it from the policy's path"
            ),
            Row("max_completion_length", "model.max_completion_length", same, note="512 by default in TRL, 256 here"),
            Row("temperature", "model.temperature", same),
            Row("top_p", "model.top_p", same, "what it keeps is kept in the scoring here"),
            Row("top_k", "model.top_k", same, "likewise"),
            Row("min_p", "model.min_p", unless(None), "likewise"),
            Row("reward_funcs", "model.rewards", values.rewards, "completions come as text here, also of chat prompts"),
            Row("reward_model_name_or_path", "model.rewards", values.rewards),
            Row("reward_weights", "model.reward_weights", unless(None)),
            Row("mask_truncated_completions", "model.mask_truncated", unless(False)),
            Row("shuffle_dataset", "data.shuffle", same),
            Row("log_completions", "trainer.callbacks", unless(False, [{"class_path": "SampleTable"}])),
            Row("num_completions_to_print", "", nothing),
            Row("log_unique_prompts", "", nothing),
            Row("num_generations_eval", "", nothing, "validation judges one greedy completion of each prompt"),
            Row("disable_dropout", "", nothing, "always off here; on by default in TRL"),
            refusal("use_vllm", False, "stack --config engines/vllm: vLLM's own server"),
            Row("use_transformers_continuous_batching", "", nothing, "the sampler has its own batches"),
            refusal("sync_ref_model", False, "the reference of GRPO stays as it is here"),
            Row("ds3_gather_for_generation", "", nothing),
            Row("log_multimodal", "", nothing, "text alone here"),
        ),
    ),
    Section(
        "GRPO",
        ("grpo",),
        (
            Row(
                "loss_type",
                "model.loss",
                same,
                "`dapo` in both; `bnpo` divides by the tokens of a micro-batch in TRL and by the step's here",
            ),
            Row(
                "scale_rewards",
                "model.scale_rewards",
                values.scaling,
                "the deviation is exact here; TRL adds 1e-4 to it, and equal rewards give 0 in both",
            ),
            Row("multi_objective_aggregation", "model.multi_objective_aggregation", unless("sum_then_normalize")),
            Row(
                "use_bias_correction_kl",
                "model.kl_estimator",
                values.kl_estimator,
                note="on by default in TRL: `k3+score`; here the default is `k3`, the paper's",
            ),
            Row("epsilon", "model.epsilon", of_loss(*values.CLIPPED)),
            Row(
                "epsilon_high",
                "model.epsilon_high",
                values.cap,
                note="of `cispo` the cap itself in TRL (5 there), and how far it is above 1 here (4)",
            ),
            Row("delta", "model.delta", of_loss(*values.CLIPPED, value=unless(None))),
            Row("importance_sampling_level", "model.importance_level", values.level, "clip ranges follow it here"),
            Row("sapo_temperature_pos", "model.loss_options.temperature_pos", of_loss("sapo")),
            Row("sapo_temperature_neg", "model.loss_options.temperature_neg", of_loss("sapo")),
            Row("vespo_k_pos", "model.loss_options.k_pos", of_loss("vespo")),
            Row("vespo_lambda_pos", "model.loss_options.lambda_pos", of_loss("vespo")),
            Row("vespo_k_neg", "model.loss_options.k_neg", of_loss("vespo")),
            Row("vespo_lambda_neg", "model.loss_options.lambda_neg", of_loss("vespo")),
            Row("top_entropy_quantile", "model.top_entropy_quantile", unless(1.0)),
            Row(
                "off_policy_mask_threshold", "model.correction", values.off_policy, "`correction: opsm` with its bound"
            ),
            Row("entropy_coef", "model.entropy_coef", unless(0.0)),
            Row("use_adaptive_entropy", "", nothing),
            Row("entropy_target", "model.entropy_target", where("use_adaptive_entropy"), "adapted once a rollout here"),
            Row("entropy_coef_delta", "model.entropy_coef_delta", where("use_adaptive_entropy")),
            Row("cast_lm_head_to_fp32", "", nothing, "log-probabilities are float32 here with any precision"),
            refusal("max_tool_calling_iterations", None, "give model.max_turns beside model.tools"),
        ),
    ),
    Section(
        "RLOO",
        ("rloo",),
        (
            Row("epsilon", "", values.one_update, "with one optimizer step a rollout no ratio is clipped"),
            Row("epsilon_high", "", values.one_update),
            refusal("normalize_advantages", False, "advantages of RLOO are not normalised here"),
            refusal("reward_clip_range", None, "clip in the reward function"),
        ),
    ),
)
