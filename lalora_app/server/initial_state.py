"""The server's state before the first round."""

from lalora_app.adapter.factors import Adapter
from lalora_app.data.encoding import Encoded
from lalora_app.methods.compatibility import method_of
from lalora_app.models.backbone import Backbone
from lalora_app.server.losa_masks import losa_adapter_and_drift
from lalora_app.server_state.state import ServerState
from lalora_app.settings.run_config import Config


def initial_state(config: Config, model: Backbone, public: Encoded, start: Adapter) -> ServerState:
    """Return the state before the first round, with masks and drift if the method sets them.

    Args:
        config: the run's config.
        model: the backbone; the start is loaded into it.
        public: the encoded examples of the public test split.
        start: the initial adapter of :func:`~lalora_app.models.backbone.build`.

    Privacy: public inputs only.
    """
    if not method_of(config).calibrates:
        return ServerState(start)
    model.load(start)  # an earlier run in this process may have moved the base
    adapter, drift = losa_adapter_and_drift(model, public, start, config.rule)
    return ServerState(adapter, drift=drift)
