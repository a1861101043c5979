"""What a run under secure aggregation cannot be: the server knows one sum a round."""

from lalora_app.settings.run_config import Config, ConfigError


def check(config: Config, *, linear: bool) -> None:
    """Check that a sum of the uploads is all that the run's server needs.

    Args:
        config: of the run.
        linear: whether that holds of its method.

    Raises:
        ConfigError: naming the key, its value and the reason.
    """
    chosen = config.secure_aggregation
    if chosen == "none":
        return
    here = f'secure-aggregation="{chosen}"'
    if not linear:
        raise ConfigError(
            f'{here} must be "none" for method {config.method}, whose server rule needs each '
            "client's factors"
        )
    if config.robust != "none":
        raise ConfigError(
            f'robust="{config.robust}" must be "none" for {here}: it compares uploads, and the '
            "server sees only their sum"
        )
    if config.weighting != "uniform":
        raise ConfigError(
            f'weighting="{config.weighting}" must be "uniform" for {here}: masks cancel in a '
            "plain sum only"
        )
    if config.min_replies < 2:
        raise ConfigError(
            f"min-replies={config.min_replies} must be at least 2 for {here}: a sum of one upload "
            "is that upload"
        )
