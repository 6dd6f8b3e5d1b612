"""Command `gen-accel`, also as `python -m gen_accel` and `accelerate launch -m gen_accel`."""

from gen_accel.registry import needed_for


def main() -> None:
    try:
        with needed_for("gen-accel", extra="cli"):
            import typer  # noqa: F401
    except ModuleNotFoundError as error:
        raise SystemExit(f"error: {error}") from None
    from gen_accel.cli import main as run

    run()


if __name__ == "__main__":
    main()
