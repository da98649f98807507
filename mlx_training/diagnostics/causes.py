"""What can be wrong, in the words the doctor uses: an id that scripts may rely on, a sentence, and what to change."""

from typing import NamedTuple


class Cause(NamedTuple):
    """One way in which training breaks."""

    sentence: str
    advice: str


CAUSES: dict[str, Cause] = {
    # Data
    "vocabulary_mismatch": Cause(
        "token ids lie outside the model's vocabulary",
        "use the tokenizer the model was trained with, or resize its embedding; compare the two sizes",
    ),
    "labels_shifted": Cause(
        "targets are not the next tokens",
        "emit targets[k] = tokens[positions[k] + 1] in collate, and shift nothing afterwards",
    ),
    "labels_visible": Cause(
        "the tokens that are to be told stand in the input",
        "put the mask token in their places (80 % of them), and keep what they were as targets",
    ),
    "labels_swapped": Cause(
        "answers stand with other rows than their own", "keep questions and answers in one record; never sort one list"
    ),
    "mask_inverted": Cause(
        "the loss mask is inverted: answers are not supervised and everything else is",
        "mask must be 1 where supervised",
    ),
    "prompt_supervised": Cause("prompt tokens are supervised", "set the mask to 0 up to the end of the prompt"),
    "padding_supervised": Cause(
        "padding is supervised", "set the mask to 0 after the end-of-text token; do not use pad = eos as a label"
    ),
    "nothing_supervised": Cause(
        "rows have no supervised token", "look for empty answers and for prompts that fill max_length"
    ),
    "answer_truncated": Cause(
        "answers lose their end to the length limit", "raise dataset.max_length, or shorten prompts and series"
    ),
    "eos_missing": Cause("the end-of-text token is never a label", "append eos to every answer, once"),
    "bos_repeated": Cause(
        "the beginning-of-text token stands more than once in a row",
        "tokenise fragments without special tokens and put one at the start",
    ),
    "patches_after_answer": Cause(
        "patches stand after the labels, which then cannot see them", "put the soft prompt before the answer"
    ),
    "patches_misplaced": Cause(
        "rows see patches of other rows or series", "build patch_index from the same order as series"
    ),
    "series_nonfinite": Cause("series hold NaN or infinite values", "drop or repair the rows that are named"),
    "series_constant": Cause(
        "series are constant, so they say nothing", "drop the channel, or check the unit and the column that is read"
    ),
    "series_not_normalized": Cause(
        "series reach the model without normalisation", "set dataset.normalize: zscore, or scale them before"
    ),
    "rows_duplicated": Cause("training rows are copies of each other", "remove the copies that are named"),
    "leakage": Cause(
        "rows of the training split stand in another split too",
        "split by group (subject, recording) or by content, and remove copies",
    ),
    "answers_unbalanced": Cause(
        "one answer covers nearly all rows, so a constant is a good model", "balance the answers, or report macro-F1"
    ),
    "batches_repeat": Cause(
        "different steps get the same batch", "advance the index; do not restart the iterator every step"
    ),
    "batches_not_reproducible": Cause(
        "the same step gets different batches", "derive order and noise from (seed, epoch), not from a global generator"
    ),
    # Model
    "unregistered_parameters": Cause(
        "parameters of the table are unknown to the framework",
        "keep modules in attributes or in the framework's own containers (MLX: lists and dicts; PyTorch: "
        "ModuleList), without a leading underscore",
    ),
    "unexpected_parameters": Cause(
        "trainable parameters are not in the table", "freeze them, or add them to the spec's table"
    ),
    "misshaped_parameters": Cause("parameters have other shapes than the table", "follow the table's layout"),
    "frozen_parameters": Cause(
        "parameters that should train are frozen", "unfreeze them after freezing the language model"
    ),
    "frozen_weights_trainable": Cause(
        "weights that should be frozen are trainable", "freeze the language model before the optimiser is built"
    ),
    "frozen_weights_changed": Cause(
        "the frozen weights have changed", "nothing but a checkpoint load may write them; look for in-place operations"
    ),
    "init_too_large": Cause("initial values are larger than the table says", "initialise from the table"),
    "init_zero": Cause(
        "initial values are zero (or nearly) where the table says random",
        "initialise from the table; two zero layers in a row never learn",
    ),
    "nonfinite_parameters": Cause("parameters hold NaN or infinite values", "load the last good checkpoint"),
    "overflow": Cause(
        "activations leave the range of numbers although inputs and weights are finite",
        "use bfloat16 or float32 in the named module, and subtract the maximum before exp",
    ),
    "dead_activations": Cause(
        "a module's output is the same for every input", "look at its bias and activation; use GELU, a smaller rate"
    ),
    "random_in_evaluation": Cause(
        "evaluation is random", "switch dropout off in evaluation (model.eval()), and use no global generator"
    ),
    "batch_remembered": Cause(
        "a batch's result depends on the batch before it", "start every batch from fresh states; keep none in the model"
    ),
    "future_visible": Cause("labels can see tokens after them", "use a causal mask: key <= query"),
    "past_hidden": Cause("labels cannot see the tokens before them", "use a causal mask: key <= query, not <"),
    "rows_mixed": Cause(
        "a row's result depends on its neighbours in the batch", "no statistics and no attention across rows"
    ),
    "padding_attended": Cause("padding changes the result", "mask padding patches and tokens in attention and pooling"),
    "realisation_differs": Cause(
        "MLX and PyTorch compute different numbers",
        "compare the named module with the other backend's (see tools/compare_backends.py)",
    ),
    "decoding_differs": Cause(
        "the model says something else when it reads token by token",
        "append to the cache (or keep the state) at every token, and go on with positions where the prompt ended",
    ),
    "expert_unused": Cause(
        "an expert never gets a token",
        "raise model.decoder.experts.balance; look at what is added to the router's output",
    ),
    "adapter_not_applied": Cause(
        "adapters have no part in what their Linears put out",
        "call the adapted module itself, and look at the names of targets",
    ),
    "adapter_scale": Cause(
        "adapters are not multiplied by alpha / r",
        "PEFT's lora_alpha is divided by r; mlx-lm multiplies by its `scale` as it is",
    ),
    "adapters_swapped": Cause(
        "Linears use an A or B that is another's", "map names one by one; sorted, layer 10 comes before layer 2"
    ),
    # Gradients
    "initial_loss": Cause(
        "the first loss is far from that of guessing", "look at initial values, the head, and the division by weight"
    ),
    "disconnected": Cause(
        "the loss depends on these parameters, but no gradient reaches them",
        "remove stop_gradient, detach, no_grad, round trips through NumPy between them and the loss",
    ),
    "no_influence": Cause(
        "the loss does not depend on these parameters at all",
        "make sure that the forward pass uses this very module, and that its output reaches the loss",
    ),
    "gradient_wrong": Cause(
        "the gradient is not the derivative of the loss", "check custom backward passes and gradient scaling"
    ),
    "gradient_nonfinite": Cause("gradients are NaN or infinite", "look at the named module; sqrt, log and 0/0"),
    "gradient_vanishing": Cause(
        "gradients vanish on the way", "look for saturation, tiny scales and very deep stacks without residuals"
    ),
    "gradient_exploding": Cause(
        "gradients explode on the way", "lower the scale of the initial values, add normalisation"
    ),
    # Update
    "weight_not_count": Cause(
        "the objective returns means, or a weight that is not its number of terms",
        "return {loss: sum, weight: count}; the step divides once",
    ),
    "norm_misreported": Cause(
        "the reported gradient norm is not the norm of the gradients",
        "take the square root of the summed squares over all leaves; tree_flatten yields (path, array) pairs",
    ),
    "clip_ignored": Cause("gradients are not clipped as configured", "pass grad_clip_norm to the step"),
    "clip_wrong": Cause(
        "gradients are clipped by something else than their global norm", "scale all by limit / (norm + 1e-6) when > 1"
    ),
    "learning_rate_zero": Cause("the learning rate is zero", "look at the schedule, the warm-up and the groups"),
    "learning_rate_wrong": Cause(
        "the update does not use the learning rate it was given", "set the rate of every group before every step"
    ),
    "no_bias_correction": Cause(
        "Adam runs without bias correction: the first steps are about 3 times too long",
        "MLX: optim.AdamW(..., bias_correction=True)",
    ),
    "learning_rate_too_large": Cause(
        "the learning rate is far too large",
        "lower it; AdamW moves by about the rate a step",
    ),
    "learning_rate_too_small": Cause(
        "at this learning rate nothing can move far in the whole run", "raise it; AdamW moves by about the rate a step"
    ),
    "state_lost": Cause(
        "the optimiser's state does not survive from step to step", "build the optimiser once, before the loop"
    ),
    "decay_coupled": Cause("weight decay is added to the gradient (L2), not decoupled", "use AdamW, not Adam"),
    "decay_decoupled": Cause(
        "weight decay is decoupled, not added to the gradient (L2)", "add it to the gradient, or configure adamw"
    ),
    "eps_misplaced": Cause("eps stands under the square root, not beside it", "divide by sqrt(v) + eps"),
    "momentum_stale": Cause(
        "the momentum is not updated: it is still that of an earlier step",
        "write the new momentum back; give a compiled step its state as input and as output",
    ),
    "muon_misplaced": Cause(
        "Muon moves parameters that are not hidden matrices, or leaves out some that are",
        "embeddings, positions, heads, norms and biases are AdamW's: go by the parameter table (Param.hidden)",
    ),
    "decay_ignored": Cause("weight decay is not applied where the table says so", "pass weight_decay to its group"),
    "decay_everywhere": Cause(
        "weight decay pulls at parameters that the table exempts", "give biases and norms their own group, decay 0"
    ),
    "gradients_accumulate": Cause(
        "gradients of earlier steps are still in", "clear the gradients before every step (zero_grad)"
    ),
    "update_discarded": Cause(
        "the model's parameters do not move",
        "build the optimiser after the model is complete, and write the updated parameters back into it",
    ),
    "update_wrong": Cause(
        "the update is not the configured optimiser's", "compare the step with diagnostics/optimizers.py, term by term"
    ),
    "accumulation_wrong": Cause(
        "several micro-batches do not equal one batch", "add sums and counts, divide once: no mean of means"
    ),
    "micro_batches_dropped": Cause(
        "only one of several micro-batches reaches the gradient", "accumulate; do not overwrite"
    ),
    "compiled_differs": Cause(
        "later compiled steps differ from the same steps uncompiled",
        "give mx.compile all state as inputs and outputs (model, optimiser, random state)",
    ),
    "parameters_unreadable": Cause(
        "parameters cannot be read after a step", "attach evaluated arrays to the model after every compiled step"
    ),
    "ascent": Cause("training one batch raises its loss", "check the sign of the loss and of the update"),
    "cannot_overfit": Cause(
        "one batch, trained on over and over, is not learnt", "raise the learning rate; look at the checks above"
    ),
    "resume_differs": Cause(
        "a resumed run does not continue as an uninterrupted one",
        "save and load the optimiser's moments and its step; take randomness and order from (seed, step)",
    ),
    # A trained run
    "series_ignored": Cause(
        "the trained model does not use the series: without them it answers just as well",
        "look at the gradient of the encoder, and whether text alone tells the answer",
    ),
    "metrics_damaged": Cause("metrics.jsonl cannot be read", "look at the file; a run that is resumed writes it again"),
    "loss_nonfinite": Cause("the loss became NaN or infinite", "look at the rows and the module that are named"),
    "loss_flat": Cause("the loss has not fallen", "raise the learning rate; run the doctor on the configuration"),
    "loss_spikes": Cause("the loss jumps", "lower the learning rate, clip at 1.0, lengthen the warm-up"),
    "overfitting": Cause("evaluation gets worse while training gets better", "stop earlier, add data or weight decay"),
    "checkpoint_damaged": Cause("the checkpoint cannot be used", "use an older one; see the message"),
    # Speed and environment
    "full_logits": Cause(
        "logits of the whole sequence are built", "apply the head at label positions only (model.logprobs)"
    ),
    "recompiles": Cause("the step is compiled again and again", "pad to few lengths (buckets); pass scalars as arrays"),
    "host_sync": Cause(
        "every step waits for the device before it returns",
        "take no number out of an array (.item(), float, print) inside objective, model or step",
    ),
    "data_stall": Cause("steps wait for data", "tokenise once and prepare batches ahead"),
    "padding_share": Cause("much of every batch is padding", "group rows of similar length"),
    "backend_missing": Cause("the configured backend or device is not usable", "see the message for what to install"),
    "memory_short": Cause("the plan needs more memory than there is", "see `mlx-training plan`"),
    "raised": Cause("a check could not run: the code raised", "see the message"),
}
