//! The one workspace of a connection: entered once, shared by its channels.
//!
//! The session that comes first decides what it is made of, since only sessions can say; a forwarding that
//! comes before waits for it.

use super::backend::{Backend, Entered, Place, Refusal};
use crate::{login::Terminal, store::UserRecord, workspace::Wish};
use futures::FutureExt as _;
use std::sync::Arc;
use tokio::sync::watch;

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
    /// Sessions on their way in.
    entering: usize,
}

/// One session on its way in.
struct OnTheWay<'a>(&'a watch::Sender<View>);

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
        Wish { name: self.name.clone(), image: None, need: None }
    }

    /// Brings a session in.
    pub(super) async fn enter(&self, wish: Wish, terminal: Option<&mut dyn Terminal>) -> Result<Entered, Refusal> {
        let _on_the_way = OnTheWay::new(&self.view);
        let entered = self.backend.enter(&self.user, wish, terminal).await?;
        self.view.send_modify(|view| view.place = Some(entered.place.another()));
        Ok(entered)
    }

    /// Brings in something that is no session and cannot wish: joins the one there is, or the session on
    /// its way, or goes first.
    pub(super) async fn join(&self) -> Result<Box<dyn Place>, Refusal> {
        let mut view = self.view.subscribe();
        loop {
            if let Some(place) = self.current() {
                return Ok(place);
            }
            if view.borrow_and_update().entering == 0 {
                return Ok(self.enter(self.wish(), None).await?.place);
            }
            // The sender lives as long as `self`.
            _ = view.changed().await;
        }
    }

    /// The workspace, if this connection is in it and it runs.
    pub(super) fn current(&self) -> Option<Box<dyn Place>> {
        self.view.borrow().place.as_ref().filter(|place| place.ended().now_or_never().is_none()).map(|it| it.another())
    }

    /// Whether a session is on its way in.
    pub(super) fn is_being_entered(&self) -> bool {
        self.view.borrow().entering > 0
    }
}
