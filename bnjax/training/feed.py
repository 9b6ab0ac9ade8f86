"""The feed of a run's steps, in the order that its seed gives."""

import jax

from bnjax.data.pipeline import Feed, make_feed
from bnjax.data.resident import Report
from bnjax.data.sources import Source
from bnjax.training.config import Config
from bnjax.training.state import Stream, stream_key


def make_run_feed(
    config: Config,
    source: Source,
    *,
    shards: int = 1,
    shard: int = 0,
    report: Report = lambda done, total: None,  # noqa: ARG005
) -> Feed:
    """Return what feeds the steps of a run; see `bnjax.data.pipeline.make_feed`."""
    rng = jax.random.key(config.seed)
    return make_feed(
        config,
        source,
        lambda epoch: stream_key(rng, Stream.ORDER, epoch),
        shards=shards,
        shard=shard,
        report=report,
    )
