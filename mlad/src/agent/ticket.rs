//! Tickets: the names of connections that wait for the gateway to take them.

use crate::channel::Connection;
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::sync::{OwnedSemaphorePermit, oneshot};

/// A connection of the gateway, and the right to have it.
#[derive(Debug)]
pub(super) struct Guest {
    pub(super) connection: Connection,
    pub(super) permit: OwnedSemaphorePermit,
}

/// All tickets that are out. How many is bounded by who issues them: each holds a permit of its listener.
#[derive(Debug, Clone, Default)]
pub(super) struct Tickets {
    out: Arc<Mutex<Out>>,
}

#[derive(Debug, Default)]
struct Out {
    last: u64,
    waiting: HashMap<u64, oneshot::Sender<Guest>>,
}

/// One ticket; it is void when this is dropped.
#[derive(Debug)]
pub(super) struct Ticket {
    pub(super) number: u64,
    taken: oneshot::Receiver<Guest>,
    tickets: Tickets,
}

impl Tickets {
    pub(super) fn issue(&self) -> Ticket {
        let (sender, taken) = oneshot::channel();
        let mut out = self.out();
        out.last += 1;
        let number = out.last;
        out.waiting.insert(number, sender);
        Ticket { number, taken, tickets: self.clone() }
    }

    /// Gives the connection to whoever issued the ticket; back if there is no such ticket (any more).
    pub(super) fn redeem(&self, number: u64, guest: Guest) -> Result<(), Box<Guest>> {
        match self.out().waiting.remove(&number) {
            Some(sender) => sender.send(guest).map_err(Box::new),
            None => Err(Box::new(guest)),
        }
    }

    fn out(&self) -> MutexGuard<'_, Out> {
        self.out.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ticket {
    /// The gateway's connection, if it takes the ticket in time.
    pub(super) async fn taken(mut self, within: Duration) -> Option<Guest> {
        tokio::time::timeout(within, &mut self.taken).await.ok()?.ok()
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.tickets.out().waiting.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::{net::UnixStream, sync::Semaphore};

    fn guest() -> Guest {
        let (stream, _) = UnixStream::pair().unwrap();
        let permit = Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
        Guest { connection: Connection::new(stream, true), permit }
    }

    #[tokio::test]
    async fn a_ticket_is_good_once() {
        let tickets = Tickets::default();
        let ticket = tickets.issue();
        let number = ticket.number;
        assert!(tickets.redeem(number + 1, guest()).is_err());
        assert!(tickets.redeem(number, guest()).is_ok());
        assert!(tickets.redeem(number, guest()).is_err());
        assert!(ticket.taken(Duration::ZERO).await.is_some());
        assert_ne!(tickets.issue().number, number);
    }

    #[tokio::test]
    async fn a_ticket_nobody_takes_expires() {
        let tickets = Tickets::default();
        let ticket = tickets.issue();
        let number = ticket.number;
        assert!(ticket.taken(Duration::from_millis(1)).await.is_none());
        assert!(tickets.redeem(number, guest()).is_err());
        assert!(tickets.out().waiting.is_empty());
    }
}
