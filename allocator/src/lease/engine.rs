//! The one task that owns the ledger, its database and its GPUs.
//!
//! What arrives together is done together: all commands and reports of a batch become one transaction, and
//! only after it is durable are they answered and the GPUs' threads given their orders.

use super::{
    ledger::Ledger,
    record::Now,
    store::Store,
    usage::{self, day_of},
    view::Outlook,
};
use crate::{
    Account, AccountState, AllocatorError, LeaseRequest, LeaseState, Resolved,
    node::{Change, DriverError, Failure, Node, Order, Report, Stage},
    remote::{self, NodeEvent, ToNode},
};
use jiff::{SignedDuration, Timestamp};
use mlad::api::{GpuMap, Lease, Need, NewReservation, NodeInfo, Reservation, Wait};
use std::{
    collections::{BTreeSet, HashMap},
    fs::File,
    sync::Arc,
    time::Duration,
};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{Instant, sleep, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;

/// The most commands and reports done in one transaction.
const BATCH: usize = 512;
/// How long history is kept.
const HISTORY: SignedDuration = SignedDuration::from_hours(24 * 90);
/// The most ended requests that are kept.
const MOST_HISTORY: u32 = 1_000_000;
/// How often history is pruned.
const PRUNE: Duration = Duration::from_secs(3600);
/// How long to wait before a database that failed is tried again.
const RECOVER: Duration = Duration::from_secs(1);
/// How long changes under way may take when the engine stops.
const FINISH: Duration = Duration::from_secs(10);
/// How long the last changes may take to be written down then.
const WRITE: Duration = Duration::from_secs(5);
/// How long the GPUs' threads may take to end then; one that the driver holds is left to it.
const THREADS: Duration = Duration::from_secs(3);

/// Where the answer to a command goes.
pub(super) type Reply<T> = oneshot::Sender<Result<T, AllocatorError>>;

/// The time, by two clocks.
pub(super) type Clock = Arc<dyn Fn() -> Now + Send + Sync>;

/// What the engine is asked.
pub(super) enum Command {
    Resolve(Need, Reply<Resolved>),
    Request(Box<LeaseRequest>, Reply<LeaseState>),
    State(String, Reply<LeaseState>),
    Renew(String, u64, Reply<Lease>),
    Release(String, Reply<()>),
    Revoke { workload: String, reason: String, free: bool, reply: Reply<()> },
    Leases(Reply<Vec<Lease>>),
    Waits(Reply<Vec<Wait>>),
    Map(Reply<GpuMap>),
    SetAccounts(Vec<Account>, Reply<()>),
    Accounts(Reply<Vec<AccountState>>),
    Nodes(Reply<Vec<NodeInfo>>),
    ForgetNode(String, Reply<()>),
    TrustGpu(String, Reply<()>),
    Reserve(Box<NewReservation>, Reply<Reservation>),
    CancelReservation(String, Reply<()>),
    Reservations(Reply<Vec<Reservation>>),
}

/// An answer, to be given once everything is written down.
type Answer = Box<dyn FnOnce(&mut Engine, Result<(), AllocatorError>) + Send>;

/// The ledger, its database and its GPUs.
pub(super) struct Engine {
    pub(super) ledger: Ledger,
    pub(super) store: Store,
    /// The lock on the database, held for as long as the engine is there.
    pub(super) _lock: File,
    pub(super) node: Option<Node>,
    pub(super) reports: mpsc::Receiver<Report>,
    pub(super) commands: mpsc::Receiver<Command>,
    /// What daemons of other machines say; none if nobody listens to them.
    pub(super) nodes: Option<mpsc::Receiver<NodeEvent>>,
    /// Where those that have joined are told things: by node, with the fence under which it joined.
    pub(super) links: HashMap<String, (u64, mpsc::Sender<ToNode>)>,
    pub(super) version: watch::Sender<u64>,
    pub(super) clock: Clock,
    /// Why the ledger cannot be trusted: the database failed, and could not be read again.
    pub(super) broken: Option<AllocatorError>,
    /// After a failed write, nothing is granted before this.
    pub(super) hold_until: Option<Instant>,
    /// Why requests wait, worked out when it is first asked for after a change.
    pub(super) outlook: Option<Arc<Outlook>>,
}

impl Engine {
    /// Takes the ledger from the database and agrees with the driver, waiting for it at most `patience`.
    pub(super) async fn begin(&mut self, patience: Duration) -> Result<(), AllocatorError> {
        let loaded = self.store.load((self.clock)().wall).await?;
        self.ledger.load(loaded, (self.clock)());
        if self.node.is_some() {
            let until = Instant::now() + patience;
            let mut missing: Option<BTreeSet<String>> = None;
            while missing.as_ref().is_none_or(|missing| !missing.is_empty()) {
                let Ok(Some(report)) = timeout_at(until, self.reports.recv()).await else {
                    tracing::warn!(?missing, "not every GPU has answered; starting without");
                    break;
                };
                match &report {
                    Report::Down(_) => missing = Some(BTreeSet::new()),
                    Report::Listed(listed) => {
                        missing = Some(listed.iter().filter_map(|gpu| gpu.uuid.clone().ok()).collect());
                    }
                    Report::Gpu { uuid, .. } => drop(missing.as_mut().map(|missing| missing.remove(uuid))),
                    Report::Xid { .. } => {}
                }
                self.ledger.report(report, (self.clock)());
            }
        }
        self.prune().await;
        self.conclude().await
    }

    /// Does what is asked, until `stop`.
    pub(super) async fn run(mut self, stop: CancellationToken) {
        let mut prune_at = Instant::now() + PRUNE;
        loop {
            let mut batch = Vec::new();
            let mut reports = Vec::new();
            let mut events = Vec::new();
            let pause = self.pause();
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                report = self.reports.recv(), if self.node.is_some() => match report {
                    Some(report) => reports.push(report),
                    None => self.node = None,
                },
                event = next(&mut self.nodes) => match event {
                    Some(event) => events.push(event),
                    None => self.nodes = None,
                },
                command = self.commands.recv() => match command {
                    Some(command) => batch.push(command),
                    None => break,
                },
                () = sleep(pause) => {}
            }
            while let Some(event) = (events.len() < BATCH).then(|| self.nodes.as_mut()?.try_recv().ok()).flatten() {
                events.push(event);
            }
            while let Ok(report) = self.reports.try_recv() {
                reports.push(report);
            }
            while let Some(command) = (batch.len() < BATCH).then(|| self.commands.try_recv().ok()).flatten() {
                batch.push(command);
            }
            self.turn(reports, events, batch).await;
            if Instant::now() >= prune_at {
                prune_at = Instant::now() + PRUNE;
                self.prune().await;
            }
        }
        self.finish().await;
    }

    /// One batch: everything is done in memory, written down, answered, and only then ordered.
    async fn turn(&mut self, reports: Vec<Report>, events: Vec<NodeEvent>, batch: Vec<Command>) {
        let now = (self.clock)();
        for report in reports {
            self.ledger.report(report, now);
        }
        if self.broken.is_some() {
            self.recover().await;
        }
        let mut answers: Vec<Answer> = Vec::with_capacity(batch.len());
        for event in events {
            answers.extend(self.hear(event, now));
        }
        for command in batch {
            answers.push(self.perform(command, now).await);
        }
        // After what was heard: who was in time is not late.
        self.ledger.tick(now);
        let result = match self.broken.clone() {
            Some(error) => {
                self.ledger.forget();
                Err(error)
            }
            None => self.conclude().await,
        };
        for answer in answers {
            answer(self, result.clone());
        }
        // Written down, or not so: from here on the database knows.
        self.ledger.just_ended.clear();
    }

    /// Grants what can be granted, writes everything down, and gives the orders that follow.
    async fn conclude(&mut self) -> Result<(), AllocatorError> {
        if self.hold_until.is_none_or(|until| until <= Instant::now()) {
            self.hold_until = None;
            self.ledger.schedule((self.clock)());
        }
        let effects = std::mem::take(&mut self.ledger.effects);
        if !effects.writes.is_empty()
            && let Err(error) = self.store.commit(&effects.writes, self.ledger.counters()).await
        {
            tracing::error!(%error, "the ledger cannot be written; nothing of this was done");
            self.ledger.effects = effects;
            self.ledger.forget();
            self.hold_until = Some(Instant::now() + RECOVER);
            self.recover().await;
            return Err(error);
        }
        if effects.changed {
            self.outlook = None;
            self.version.send_modify(|version| *version += 1);
        }
        for (gpu, order) in effects.orders {
            self.order(gpu, order);
        }
        Ok(())
    }

    fn order(&mut self, gpu: String, order: Order) {
        let change = match &order {
            Order::Read | Order::Clear(_) => None,
            Order::Change(Change { id, .. }) => Some(*id),
        };
        let route = self.ledger.route(&gpu).map(|(node, fence)| (node.to_owned(), fence));
        let ordered = match &route {
            None => self.node.as_ref().is_some_and(|node| node.order(&gpu, order)),
            Some((node, fence)) => self.links.get(node).filter(|(other, _)| other == fence).is_some_and(|(_, link)| {
                remote::order(gpu.clone(), &order).is_some_and(|order| link.try_send(order).is_ok())
            }),
        };
        if !ordered && let Some(id) = change {
            let error = DriverError::Other("its thread takes no orders".to_owned());
            let failure = Failure { stage: Stage::Read, error: error.clone() };
            let report = Report::Gpu { uuid: gpu, reading: Err(error), change: Some((id, Err(failure))) };
            let now = (self.clock)();
            match route {
                None => self.ledger.report(report, now),
                Some((node, fence)) => self.ledger.report_from(&node, fence, report, now),
            }
        }
    }

    /// Takes in what a daemon says. Who asks is answered once all of it is written down.
    fn hear(&mut self, event: NodeEvent, now: Now) -> Option<Answer> {
        match event {
            NodeEvent::Join { joining, outbox, reply } => {
                let joined = self.ledger.join(&joining, now);
                Some(Box::new(move |engine, written| {
                    let joined = joined.and_then(|fence| match written {
                        Ok(()) => Ok(fence),
                        Err(error) => {
                            engine.ledger.leave(&joining.node, fence, now);
                            Err(remote::unwritten(&error))
                        }
                    });
                    if let Ok(fence) = &joined {
                        engine.links.insert(joining.node, (*fence, outbox));
                    }
                    drop(reply.send(joined));
                }))
            }
            NodeEvent::Renew { node, fence, reply } => {
                let held = self.ledger.renew_node(&node, fence, now);
                // Whose connection ended does not ask any more.
                Some(Box::new(move |_, _| {
                    let _ = reply.send(held);
                }))
            }
            NodeEvent::Report { node, fence, report } => {
                self.ledger.report_from(&node, fence, report, now);
                None
            }
            NodeEvent::Leave { node, fence } => {
                self.ledger.leave(&node, fence, now);
                if self.links.get(&node).is_some_and(|(other, _)| *other == fence) {
                    self.links.remove(&node);
                }
                None
            }
        }
    }

    /// Takes the ledger from the database again, after it failed: what was not written has not happened.
    async fn recover(&mut self) {
        match self.store.load((self.clock)().wall).await {
            Ok(loaded) => {
                self.ledger.load(loaded, (self.clock)());
                self.broken = None;
                self.outlook = None;
                self.version.send_modify(|version| *version += 1);
            }
            Err(error) => self.broken = Some(error),
        }
    }

    async fn prune(&mut self) {
        let now = (self.clock)().wall;
        let before = now.checked_sub(HISTORY).unwrap_or(Timestamp::MIN);
        match self.store.prune(before, MOST_HISTORY).await {
            Ok(0) => {}
            Ok(pruned) => tracing::info!(pruned, "old leases were forgotten"),
            Err(error) => tracing::warn!(%error, "old leases could not be forgotten"),
        }
        match self.store.prune_usage(day_of(now) - usage::KEPT_DAYS).await {
            Ok(0) => {}
            Ok(pruned) => tracing::info!(pruned, "old use was forgotten"),
            Err(error) => tracing::warn!(%error, "old use could not be forgotten"),
        }
    }

    /// Stops orderly: changes under way are finished and written down, as far as they end in time.
    async fn finish(&mut self) {
        let until = Instant::now() + FINISH;
        // Those of other machines are found there by the next start.
        while self.ledger.has_own_changes() {
            let Ok(Some(report)) = timeout_at(until, self.reports.recv()).await else {
                let left = self.ledger.changes.values();
                tracing::warn!(?left, "changes of GPUs are not done in time; the next start finds them at the driver");
                break;
            };
            self.ledger.report(report, (self.clock)());
        }
        // Nothing new is begun: what could be granted now is granted at the next start.
        self.ledger.stirred = false;
        if !matches!(timeout(WRITE, self.conclude()).await, Ok(Ok(()))) {
            tracing::warn!("the last changes are not written down; the next start finds them at the driver");
        }
        if let Some(node) = self.node.take() {
            // A thread may be about to report; with nobody there to listen it ends.
            self.reports.close();
            while self.reports.try_recv().is_ok() {}
            drop(tokio::task::spawn_blocking(|| node.stop(THREADS)).await);
        }
        if timeout(WRITE, self.store.close()).await.is_err() {
            tracing::warn!("the database does not close; it is left as a kill would leave it");
        }
    }

    fn pause(&self) -> Duration {
        if self.broken.is_some() {
            return RECOVER;
        }
        if let Some(until) = self.hold_until {
            return until.saturating_duration_since(Instant::now()).max(Duration::from_millis(5));
        }
        if self.ledger.stirred || !self.ledger.effects.writes.is_empty() {
            return Duration::ZERO;
        }
        let next = self.ledger.next_tick().unwrap_or(PRUNE);
        next.saturating_sub((self.clock)().steady).clamp(Duration::from_millis(5), PRUNE)
    }

    fn outlook(&mut self, now: Timestamp) -> Arc<Outlook> {
        if let Some(outlook) = self.outlook.as_ref().filter(|outlook| outlook.is_good(now)) {
            return Arc::clone(outlook);
        }
        let outlook = Arc::new(self.ledger.outlook(now));
        self.outlook = Some(Arc::clone(&outlook));
        outlook
    }

    fn state(&mut self, workload: &str) -> Result<LeaseState, AllocatorError> {
        let now = (self.clock)().wall;
        let outlook = self.outlook(now);
        let state = self.ledger.state(workload, &outlook, now);
        state.ok_or_else(|| AllocatorError::Unknown(workload.to_owned()))
    }

    async fn perform(&mut self, command: Command, now: Now) -> Answer {
        match command {
            Command::Resolve(need, reply) => {
                let resolved = self.ledger.resolve(&need).map(|resolution| Resolved::from(&resolution));
                if let Err(error) = &resolved {
                    tracing::info!(%need, reason = %error, "refused");
                }
                told(reply, move |_| resolved)
            }
            Command::Request(request, reply) => match self.ended(&request.workload).await {
                Ok(Some(ended)) => over(reply, request.workload, ended),
                Err(error) => refuse(reply, error),
                Ok(None) => match self.ledger.request(&request, now) {
                    Ok(()) => answer(reply, move |engine| {
                        let state = engine.state(&request.workload)?;
                        if let LeaseState::Waiting(Wait { workload, user, need, reason, detail, place, .. }) = &state {
                            tracing::info!(workload, user, %need, ?reason, detail, place, "waits");
                        }
                        Ok(state)
                    }),
                    Err(error) => refuse(reply, error),
                },
            },
            Command::State(workload, reply) => match self.ended(&workload).await {
                Ok(Some(Ended::Before(reason))) => told(reply, move |_| Ok(LeaseState::Ended { reason })),
                Err(error) => refuse(reply, error),
                Ok(Some(Ended::InThisTurn) | None) => told(reply, move |engine| engine.state(&workload)),
            },
            Command::Renew(workload, fence, reply) => match self.ended(&workload).await {
                Ok(Some(ended)) => over(reply, workload, ended),
                Err(error) => refuse(reply, error),
                Ok(None) => match self.ledger.renew(&workload, fence, now) {
                    Ok(()) => told(reply, move |engine| engine.ledger.lease(&workload)),
                    Err(error) => {
                        tracing::info!(workload, fence, reason = %error, "not renewed");
                        refuse(reply, error)
                    }
                },
            },
            Command::Release(workload, reply) => {
                self.ledger.release(&workload, now);
                answer(reply, |_| Ok(()))
            }
            Command::Revoke { workload, reason, free, reply } => {
                self.ledger.revoke(&workload, &reason, free, now);
                answer(reply, |_| Ok(()))
            }
            Command::Leases(reply) => told(reply, |engine| Ok(engine.ledger.all_leases())),
            Command::Waits(reply) => told(reply, |engine| {
                let now = (engine.clock)().wall;
                let outlook = engine.outlook(now);
                Ok(engine.ledger.waits(&outlook, now))
            }),
            Command::Map(reply) => told(reply, |engine| Ok(engine.ledger.map())),
            Command::Nodes(reply) => told(reply, |engine| Ok(engine.ledger.node_infos())),
            Command::ForgetNode(node, reply) => match self.ledger.forget_node(&node) {
                Ok(()) => answer(reply, |_| Ok(())),
                Err(error) => refuse(reply, error),
            },
            Command::TrustGpu(gpu, reply) => match self.ledger.trust_gpu(&gpu) {
                Ok(()) => answer(reply, |_| Ok(())),
                Err(error) => refuse(reply, error),
            },
            Command::SetAccounts(accounts, reply) => match self.ledger.set_accounts(&accounts, now) {
                Ok(()) => answer(reply, |_| Ok(())),
                Err(error) => refuse(reply, error),
            },
            Command::Reserve(new, reply) => match self.ledger.reserve(&new, now) {
                Ok(reservation) => answer(reply, |_| Ok(reservation)),
                Err(error) => refuse(reply, error),
            },
            Command::CancelReservation(name, reply) => {
                self.ledger.cancel_reservation(&name, now);
                answer(reply, |_| Ok(()))
            }
            Command::Reservations(reply) => told(reply, |engine| {
                let now = (engine.clock)();
                Ok(engine.ledger.reservations(now))
            }),
            Command::Accounts(reply) => told(reply, |engine| {
                let now = (engine.clock)();
                Ok(engine.ledger.account_states(now))
            }),
        }
    }

    /// Whether the request of a workload has ended, and is not one of those in memory.
    async fn ended(&self, workload: &str) -> Result<Option<Ended>, AllocatorError> {
        if self.ledger.known.contains_key(workload) {
            return Ok(None);
        }
        // The database does not say so yet.
        if self.ledger.just_ended.contains_key(workload) {
            return Ok(Some(Ended::InThisTurn));
        }
        Ok(self.store.ended(workload).await?.map(Ended::Before))
    }
}

/// What comes next of what may not come at all.
async fn next(events: &mut Option<mpsc::Receiver<NodeEvent>>) -> Option<NodeEvent> {
    match events {
        Some(events) => events.recv().await,
        None => std::future::pending().await,
    }
}

/// When a request ended.
enum Ended {
    /// By a command of the same turn: so it has only if that can be written down.
    InThisTurn,
    /// Before, for this reason.
    Before(String),
}

/// A refusal because the request has ended.
fn over<T: Send + 'static>(reply: Reply<T>, workload: String, ended: Ended) -> Answer {
    tracing::info!(workload, "refused: its request has ended");
    let error = AllocatorError::Ended(workload);
    match ended {
        Ended::InThisTurn => answer(reply, |_| Err(error)),
        Ended::Before(_) => refuse(reply, error),
    }
}

/// An answer that changes nothing, and so is given whether or not everything could be written down: from the
/// ledger as it is afterwards.
fn told<T: Send + 'static>(
    reply: Reply<T>,
    work_out: impl FnOnce(&mut Engine) -> Result<T, AllocatorError> + Send + 'static,
) -> Answer {
    Box::new(move |engine, _| {
        let result = match engine.broken.clone() {
            Some(error) => Err(error),
            None => work_out(engine),
        };
        // Who asked may have gone.
        drop(reply.send(result));
    })
}

/// An answer that is worked out after everything is written down, and only then.
fn answer<T: Send + 'static>(
    reply: Reply<T>,
    work_out: impl FnOnce(&mut Engine) -> Result<T, AllocatorError> + Send + 'static,
) -> Answer {
    Box::new(move |engine, written| {
        let result = written.and_then(|()| work_out(engine));
        // Who asked may have gone.
        drop(reply.send(result));
    })
}

/// A refusal, whatever is written down.
fn refuse<T: Send + 'static>(reply: Reply<T>, error: AllocatorError) -> Answer {
    Box::new(move |_, _| drop(reply.send(Err(error))))
}
