//! The one workspace of a connection: entered once, shared by its channels.
//!
//! The session that comes first decides what it is made of, since only sessions can say; a forwarding that
//! comes before waits for it.

use super::backend::{Backend, Entered, Place, Refusal};
use crate::{login::Terminal, store::UserRecord, workspace::Wish};
use futures::FutureExt as _;
use std::{sync::Arc, time::Duration};
use tokio::sync::watch;

/// Time to find out whether a workspace runs; a connection's loop may stand still for that.
const RUNNING_KNOWN: Duration = Duration::from_secs(5);

/// The workspace of a connection.
pub(super) struct Workplace {
    backend: Arc<dyn Backend>,
    user: UserRecord,
    name: String,
    view: watch::Sender<View>,
}

#[derive(Default)]
struct View {
    /// The connection's own hold on it.
    place: Option<Box<dyn Place>>,
    /// Those on their way in.
    entering: usize,
}

/// One on the way in, until this is dropped: others wait for it instead of going themselves.
pub(super) struct OnTheWay<'a>(&'a watch::Sender<View>);

impl<'a> OnTheWay<'a> {
    fn new(view: &'a watch::Sender<View>) -> Self {
        view.send_modify(|view| view.entering += 1);
        Self(view)
    }
}

impl Drop for OnTheWay<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|view| view.entering -= 1);
    }
}

impl Workplace {
    pub(super) fn new(backend: Arc<dyn Backend>, user: UserRecord, name: String) -> Self {
        Self { backend, user, name, view: watch::Sender::default() }
    }

    /// What stands behind.
    pub(super) fn backend(&self) -> &dyn Backend {
        &*self.backend
    }

    /// Who is in it.
    pub(super) fn user(&self) -> &UserRecord {
        &self.user
    }

    /// What a session wishes for that names no image and slice.
    pub(super) fn wish(&self) -> Wish {
        Wish { name: self.name.clone(), image: None, need: None, project: None }
    }

    /// A session sets out. It has arrived when it has done what others wait for, and drops this.
    pub(super) fn set_out(&self) -> OnTheWay<'_> {
        OnTheWay::new(&self.view)
    }

    /// Brings in somebody who has set out.
    pub(super) async fn enter(
        &self,
        _: &OnTheWay<'_>,
        wish: Wish,
        terminal: Option<&mut dyn Terminal>,
    ) -> Result<Entered, Refusal> {
        let entered = self.backend.enter(&self.user, wish, terminal).await?;
        self.hold(&*entered.place);
        Ok(entered)
    }

    /// Brings in something that is no session and cannot wish: joins the one there is, or the session on
    /// its way, or goes first.
    pub(super) async fn join(&self) -> Result<Box<dyn Place>, Refusal> {
        loop {
            if let Some(place) = self.current() {
                return Ok(place);
            }
            if !self.is_being_entered() {
                return Ok(self.enter(&self.set_out(), self.wish(), None).await?.place);
            }
            self.settled().await;
        }
    }

    /// The workspace if it runs, whether or not this connection is in it already; nothing is started.
    pub(super) async fn join_running(&self) -> Option<Box<dyn Place>> {
        if let Some(place) = self.current() {
            return Some(place);
        }
        let place = tokio::time::timeout(RUNNING_KNOWN, self.backend.running(&self.user, &self.name)).await.ok()??;
        self.hold(&*place);
        Some(place)
    }

    /// Returns when nobody is on the way in.
    pub(super) async fn settled(&self) {
        // The sender lives as long as `self`.
        _ = self.view.subscribe().wait_for(|view| view.entering == 0).await;
    }

    /// The workspace, if this connection is in it and it runs.
    fn current(&self) -> Option<Box<dyn Place>> {
        self.view.borrow().place.as_ref().filter(|place| place.ended().now_or_never().is_none()).map(|it| it.another())
    }

    fn hold(&self, place: &dyn Place) {
        self.view.send_modify(|view| view.place = Some(place.another()));
    }

    fn is_being_entered(&self) -> bool {
        self.view.borrow().entering > 0
    }
}
