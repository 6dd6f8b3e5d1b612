"""Plans by which diffusers splits a model over processes: its own, or the family's."""

from typing import Any

from torch import nn

from gen_accel.attention_processors.families import family_of


def context_parallel_plan(transformer: nn.Module) -> dict[str, Any]:
    """Return the model's own plan of context parallelism, or ours where diffusers has none:

        plan = context_parallel_plan(pipe.transformer)
        pipe.transformer.enable_parallelism(
            config=ContextParallelConfig(ulysses_degree=2), cp_plan=plan
        )

    HunyuanVideo's needs a method attached, be it `Dense()`: the model's own attention raises.

    Raises:
        ValueError: a model that cannot be split so, with the reason.
    """
    family = family_of(transformer)
    model: Any = transformer
    name = type(transformer).__name__
    processors = [site.module.processor for site in family.self_attentions(transformer)]
    if not all(hasattr(processor, "_parallel_config") for processor in processors):
        reason = "its attention in diffusers sees the tokens of one process only"
        raise ValueError(f"no plan of context parallelism for {name}: {reason}")
    try:
        plan = family.context_parallel(model) or model._cp_plan
    except ValueError as error:
        raise ValueError(f"no plan of context parallelism for {name}: {error}") from None
    if plan is None:
        raise ValueError(
            f"no plan of context parallelism for {name}: diffusers has none, and nor do we"
        )
    # diffusers' own for Helios names 40 blocks, however many there are.
    modules = dict(transformer.named_modules())
    return {path: part for path, part in plan.items() if "*" in path or path in modules}
