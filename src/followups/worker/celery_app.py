"""The Celery app: a tick that claims and publishes, and a task that begins, sends and settles.

The commands ``celery -A followups.worker worker``, ``... beat`` and ``... flower`` work as in any Celery app. The
broker contains hints only: it stores no results, ETAs or retries.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from celery import Task, signals
from kombu.entity import Queue

from followups.database import make_async_engine, make_engine
from followups.delivery import events
from followups.delivery.claim import release
from followups.delivery.dispatcher import Dispatcher
from followups.delivery.hints import DELIVER, DISPATCH, leases_of
from followups.delivery.pipeline import CONNECTIONS, Pipeline
from followups.delivery.pruner import Pruner
from followups.delivery.send import CALL_GRACE
from followups.errors import SettingsError
from followups.flow_control.breaker import BreakerStore
from followups.flow_control.limiter import Limiter
from followups.operations.bulk_runner import BulkRunner
from followups.session_settings import BY_KEY, ONCE_PLANNED
from followups.settings import Settings, get_settings
from followups.store.counter_totals import CounterTotals
from followups.telemetry import traces
from followups.telemetry.logs import get_logger
from followups.transports.registry import load_transport
from followups.worker import broker, celery_logs, liveness, open_files
from followups.worker.broker import CONSUMER, App
from followups.worker.schedule import beat_schedule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from celery import Celery

    from followups.delivery.hints import Hint
    from followups.operations.doctor.process_checks import Replies

log = get_logger(__name__)

UNREAD = 1000
"""Maximum number of unread messages in the tick queue; further ticks are not added. Therefore, beat and nudges cannot
fill the broker while no worker is running. Ticks do not expire, because expiry would depend on the clocks of two hosts.
If one host's clock were an hour ahead, Celery would drop all ticks. If several ticks are waiting, the dispatcher runs
only one of them.
"""

STATEMENT_TIMEOUT = timedelta(seconds=10)
"""Time limit of a worker's SQL statements, which normally take milliseconds. The time limit of a statement is at most
half a lease. If a hanging statement is aborted, the follow-ups waiting for it can still begin in time.
"""

BROKER_SILENCE = timedelta(seconds=5)
"""If the broker does not answer for this time, the connection is replaced. The limit is at most half a lease, because a
delayed hint's follow-ups are claimed again after a lease.
"""

SWITCH_INTERVAL = 0.0005
"""Seconds that a Python thread may run while another thread waits for the interpreter. With Python's default of 0.005,
the dispatcher's thread would repeatedly delay a due follow-up. The dispatcher holds the interpreter while it claims a
thousand follow-ups and publishes their hints.
"""

DRAIN_MARGIN = timedelta(seconds=5)
"""Time limit for a stopping worker to settle its attempts in flight."""


@contextmanager
def _exit_when_wrong() -> Iterator[None]:
    """If the settings are invalid, exit with code 2 and a one-sentence error.

    With invalid settings, Celery itself would print a stack trace or start anyway.
    """
    try:
        yield
    except SettingsError as error:
        sys.stderr.write(f"followups: {error}\n")
        raise SystemExit(2) from None


def broker_silence(settings: Settings) -> timedelta:
    """Return how long the broker may stay silent before its connection counts as broken."""
    return min(BROKER_SILENCE, settings.lease / 2)


def drain_limit(settings: Settings) -> timedelta:
    """Return how long a stopping worker waits to finish and settle its attempts in flight."""
    return settings.transport_timeout + CALL_GRACE + DRAIN_MARGIN


def make_app(settings: Settings) -> Celery:
    """Return the Celery app, configured for small, idempotent hints that are not needed once read."""
    app = App("followups", settings.broker_url.get_secret_value())
    silence = broker_silence(settings).total_seconds()
    app.conf.update(
        accept_content=["json"],
        task_serializer="json",
        task_ignore_result=True,
        task_store_errors_even_if_ignored=False,
        # If a crash loses a hint, the leases in the hint expire and their follow-ups are claimed again. Acknowledging
        # hints late would only cause redelivery.
        task_acks_late=False,
        task_queues=[Queue(DISPATCH), Queue(DELIVER)],
        task_default_queue=DISPATCH,
        task_create_missing_queues=False,
        task_routes={
            "followups.dispatch_due": {"queue": DISPATCH},
            "followups.remove_old": {"queue": DISPATCH},
            "followups.deliver": {"queue": DELIVER},
        },
        # Tasks only pass work to the dispatcher's thread or the pipeline's loop and return immediately. Tasks therefore
        # need no pool, and a full deliver queue delays no tick. To use more cores, run more worker processes.
        worker_pool="solo",
        worker_prefetch_multiplier=1,
        worker_hijack_root_logger=False,
        worker_send_task_events=True,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={
            # A message is deleted from Redis as soon as it is received. Without this setting, kombu would keep a copy
            # of each message until the message is acknowledged. If a slow Redis lost an acknowledgement, the message
            # would count as prefetched forever. A worker whose prefetched messages are never acknowledged stops
            # consuming messages.
            "ack_emulation": False,
            "global_keyprefix": settings.broker_prefix,
            "socket_timeout": silence,
            "socket_connect_timeout": silence,
            "socket_keepalive": True,
            # With these settings, a half-open connection is detected within twice `silence` plus a second.
            "health_check_interval": silence,
            # Kombu itself retries, so retries by redis-py would multiply the attempts. If both retried, a publish to a
            # silent broker would take 51 s. With kombu's retries alone, the publish takes 26 s.
            "retry_on_timeout": False,
        },
        # While the broker is unreachable, a publish takes at most two seconds before it fails. If the publish fails,
        # the leases are released.
        task_publish_retry_policy={"max_retries": 3, "interval_start": 0.1, "interval_step": 0.3, "interval_max": 1},
        beat_scheduler="followups.worker.schedule:Scheduler",
        beat_max_loop_interval=min(settings.tick_interval.total_seconds(), 1.0),
        beat_schedule=beat_schedule(settings),
        timezone="UTC",
    )
    return app


with _exit_when_wrong():
    settings = get_settings()
app = make_app(settings)
celery_logs.install(settings)
if not settings.remote_control:
    broker.restrict_remote_control()


class Process:
    """The components of one worker process, created on first use after the fork."""

    def __init__(self) -> None:
        """Create the components of the process without connecting to anything."""
        traces.start("followups-worker")
        url = settings.database_url.get_secret_value()
        connection: Any = {
            "application_name": "followups-worker",
            "statement_timeout": min(STATEMENT_TIMEOUT, settings.lease / 2),
        }
        self.engine = make_engine(url, pool_size=4, options=BY_KEY, **connection)
        in_loop = make_async_engine(url, pool_size=CONNECTIONS, options=ONCE_PLANNED, **connection)
        self.dispatcher = Dispatcher(settings, self.engine, publish)
        transport = load_transport(settings)
        shared = (Limiter(settings), BreakerStore(settings, settings.transport))
        self.pipeline = Pipeline(settings, in_loop, transport, nudge, *shared)
        self.totals = CounterTotals(self.engine)
        self.pruner = Pruner(settings, self.engine)
        self.bulk = BulkRunner(self.engine, self.dispatcher.tick)
        self.draining = False

    def start(self) -> None:
        """Start all components; each one waits until the database can be reached."""
        self.dispatcher.start()
        self.pipeline.start()
        self.totals.start()

    def stop(self) -> None:
        """Drain: stop claiming, settle the attempts in flight, release the unused leases."""
        # this comes first, because the other steps may wait for a silent database
        self.pipeline.stop_beginning()
        self.dispatcher.stop()
        self.pruner.stop()
        self.bulk.stop()
        unsettled = self.pipeline.drain(drain_limit(settings))
        if unsettled:
            log.error("drained_in_part", unsettled=unsettled)
        self.totals.stop()
        self.engine.dispose()
        traces.stop()


_processes: dict[int, Process] = {}
"""The components of each process, keyed by process id. A forked child creates its own components."""
_making = threading.Lock()


def current_process() -> Process:
    """Return this process's components, with the pipeline running."""
    with _making:
        process = _processes.get(os.getpid())
        if process is None:
            process = _processes[os.getpid()] = Process()
            process.start()
            _collect_seldom()
            sys.setswitchinterval(SWITCH_INTERVAL)
        return process


def _collect_seldom() -> None:
    # The garbage collector need not scan the objects that exist now, because they live as long as the process. The
    # objects that deliveries allocate contain no cycles, so reference counting frees them. With default thresholds,
    # garbage collection took a fifth of a loaded worker's time.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


class Bounded(Task):
    """A Celery task that is not sent while too many messages wait in its queue."""

    def apply_async(self, args: Any = None, kwargs: Any = None, *, producer: Any = None, **options: Any) -> Any:  # noqa: ANN401 - Celery's own
        """Check the queue and send the task over the same connection; return None if it was not sent."""
        with self.app.producer_or_acquire(producer) as acquired:
            if unread(acquired, DISPATCH) >= UNREAD:
                return None
            return super().apply_async(args, kwargs, producer=acquired, **options)


def unread(producer: Any, queue: str) -> int:  # noqa: ANN401 - kombu's producer
    """Return the number of messages in a queue, or 0 if the broker is unreachable."""
    connection, channel = producer.connection, producer.channel
    if channel.closed:
        return 0  # the channel was closed together with its connection; the next publish opens new ones
    try:
        return int(channel.queue_declare(queue).message_count)
    except (*connection.connection_errors, *connection.channel_errors):
        return 0  # the lost connection is replaced when the message is sent


@app.task(name="followups.dispatch_due", base=Bounded)
def dispatch_due(*_: object, **__: object) -> None:
    """Claim the follow-ups that are due before the next tick, and publish them in batches."""
    process = current_process()
    process.dispatcher.tick()
    process.bulk.start()


@app.task(name="followups.remove_old", base=Bounded)
def remove_old(*_: object, **__: object) -> None:
    """Start a thread that deletes finished follow-ups after RETENTION and idempotency keys after a day."""
    current_process().pruner.start()


@app.task(name="followups.deliver", bind=True)
def deliver(task: Any, entries: object = None, keys: object = None, *_: object, **__: object) -> None:  # noqa: ANN401 - Celery's task
    """Deliver the hint's follow-ups: begin, send and settle each at its due time."""
    try:
        leases = leases_of(entries, keys)
    except ValueError as error:
        log.warning("hint_dropped", error=str(error), task_id=task.request.id)
        return
    process = current_process()
    if process.draining:
        release(process.engine, leases)
        return
    process.pipeline.submit(leases, task.request.id or "")


def publish(hint: Hint) -> None:
    """Publish one hint. Raises kombu's OperationalError if the broker is unreachable."""
    # Flower displays this text for each task. Otherwise, Celery would spend time shortening the hint for display.
    count = len(hint.entries)
    shown = f"{count} follow-up{'s, the first' if count > 1 else ','} {hint.entries[0][0]}"
    # A hint, like a tick, does not expire. If a hint arrives too late, its leases have expired and `begin` refuses
    # them.
    deliver.apply_async(args=hint, argsrepr=shown)


class Nudger:
    """Asks for a tick to run soon; calls never block or raise, and their rate is limited."""

    INTERVAL = 0.01
    """The minimum number of seconds between two nudges from one process."""

    def __init__(self, ask: Callable[[], None]) -> None:
        """Store ``ask``, a function that sends a nudge and may be slow or fail."""
        self._ask = ask
        self._wanted = threading.Event()
        self._started = threading.Lock()
        self._pid = 0

    def __call__(self) -> None:
        """Request a tick. If the broker is unreachable, beat's next tick does the work."""
        with self._started:
            if self._pid != os.getpid():
                self._pid = os.getpid()
                threading.Thread(target=self._run, name="nudger", daemon=True).start()
        self._wanted.set()

    def _run(self) -> None:
        pause = threading.Event()
        while True:
            self._wanted.wait()
            self._wanted.clear()
            try:
                self._ask()
            except Exception as error:  # noqa: BLE001 - a lost nudge costs a tick, nothing more
                events.broker_unreachable("nudge", error)
            pause.wait(self.INTERVAL)


def ask_for_tick() -> None:
    """Send one tick to the broker now. Raises the client's error if the broker is unreachable."""
    dispatch_due.apply_async(retry=False)


nudge = Nudger(ask_for_tick)


def ask_workers() -> Replies:
    """Wait one second for the workers' state reports (`liveness.signs_of_life`), and return them."""
    return app.control.broadcast("signs_of_life", reply=True, timeout=1.0) or []


@signals.celeryd_init.connect
def _check_transport(**_: object) -> None:
    with _exit_when_wrong():
        load_transport(settings)


@signals.celeryd_init.connect
def _show_life(sender: str = "", **_: object) -> None:
    CONSUMER.thread = threading.current_thread()
    if heart := liveness.start(settings.runtime_dir, "worker", sender):
        liveness.watch_consumer(heart, broker_silence(settings), lambda: app.amqp.queues.consume_from)


@signals.worker_ready.connect
@signals.worker_process_init.connect
def _warm_up(sender: Any = None, **_: object) -> None:  # noqa: ANN401 - the worker, or nothing in a child
    # The process connects at startup, so that its first follow-up is not delayed. A parent process of forked workers
    # delivers nothing itself.
    pool = getattr(sender, "pool", None)
    if type(pool).__module__ == "celery.concurrency.prefork":
        return
    open_files.raise_limit(settings.concurrency)
    try:
        process = current_process()
    except Exception as error:
        # Celery logs an exception from a signal handler and continues. The worker would then seem alive but would send
        # nothing.
        log.critical("worker_cannot_start", exc_info=error)
        raise SystemExit(1) from None
    if heart := liveness.start(settings.runtime_dir, "worker", f"child-{os.getpid()}"):
        liveness.watch_work(heart, process.dispatcher, process.pipeline)


@signals.beat_init.connect
def _stop_beat_in_order(**_: object) -> None:
    # Celery's own handler closes the producer while the signal is being handled. An interrupted publish still holds its
    # lock, so Celery's handler would wait forever. In a test with ten ticks per second, two of about thirty beat
    # processes never exited. A signal handler that raises an exception makes the interrupted publish release its locks.
    # Our handler raises an exception, and beat closes the producer afterwards.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))


@signals.worker_shutting_down.connect
def _stop_beginning(**_: object) -> None:
    liveness.drain(drain_limit(settings) + DRAIN_MARGIN)
    if process := _processes.get(os.getpid()):
        process.draining = True
        process.dispatcher.claim_no_more()


@signals.worker_shutdown.connect
@signals.worker_process_shutdown.connect
def _drain(**_: object) -> None:
    if process := _processes.get(os.getpid()):
        process.stop()
    liveness.stop()
