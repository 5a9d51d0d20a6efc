//! GPUs that reported an error after which they are not to be trusted: nothing is granted on them any more, and who
//! holds something of them is told. It ends when the machine is started anew, or when an administrator says so.

use super::{
    ledger::Ledger,
    record::{LeaseRow, Now, QuarantineRow, Write},
};
use crate::{AllocatorError, node};
use mlad::api::Lease;

impl Ledger {
    /// A GPU of a node reported a critical error.
    pub(super) fn fatal(&mut self, node: &str, uuid: &str, xid: Option<u64>, now: Now) {
        let own = self.gpus.iter().find(|gpu| gpu.uuid == uuid && *gpu.node == *node);
        let index = own.map(|gpu| gpu.index);
        let trouble = xid.and_then(node::trouble);
        tracing::error!(node, gpu = index, uuid, xid, trouble, "a GPU reports a critical error; it is read anew");
        // A GPU that is not known to be of that node is not the node's to put away.
        let (Some(reason), Some(_)) = (trouble, own) else { return };
        if self.quarantine.get(uuid).is_some_and(|known| known.reason == reason) {
            return;
        }
        let row = QuarantineRow {
            gpu: uuid.to_owned(),
            node: node.to_owned(),
            boot: self.boot_of(node),
            reason,
            at: now.wall,
        };
        tracing::error!(node, gpu = index, uuid, reason = row.reason, "the GPU is in quarantine");
        self.effects.writes.push(Write::Quarantine(row.clone()));
        self.quarantine.insert(uuid.to_owned(), row);
        self.rebuild(uuid);
        self.stir();
    }

    /// Takes over what the database says, but for machines that were started anew since.
    pub(super) fn load_quarantine(&mut self, rows: Vec<QuarantineRow>) {
        for row in rows {
            if row.node == self.node && row.boot != self.boot_of(&row.node) {
                self.effects.writes.push(Write::Trust { gpu: row.gpu });
            } else {
                self.quarantine.insert(row.gpu.clone(), row);
            }
        }
    }

    /// A node was started anew: what was wrong with its GPUs is over, or comes again.
    pub(super) fn trust_node(&mut self, node: &str) {
        let of = self.quarantine.values().filter(|row| row.node == node);
        for gpu in of.map(|row| row.gpu.clone()).collect::<Vec<_>>() {
            self.trust(&gpu);
        }
    }

    /// A GPU, by its UUID, is trusted again.
    pub(super) fn trust_gpu(&mut self, uuid: &str) -> Result<(), AllocatorError> {
        match self.quarantine.contains_key(uuid) {
            true => self.trust(uuid),
            false if self.gpus.iter().any(|gpu| gpu.uuid == uuid) => {}
            false => return Err(AllocatorError::Unknown(uuid.to_owned())),
        }
        Ok(())
    }

    fn trust(&mut self, uuid: &str) {
        let Some(row) = self.quarantine.remove(uuid) else { return };
        tracing::info!(node = row.node, uuid, reason = row.reason, "a GPU is out of quarantine");
        self.effects.writes.push(Write::Trust { gpu: uuid.to_owned() });
        self.rebuild(uuid);
        self.stir();
    }

    /// Why nothing is granted on a GPU, if it is in quarantine.
    pub(super) fn in_quarantine(&self, uuid: &str) -> Option<String> {
        let row = self.quarantine.get(uuid)?;
        Some(format!("in quarantine since {:.0}: {}", row.at, row.reason))
    }

    /// A lease as it is told, with what is wrong with its GPUs.
    pub(super) fn told(&self, lease: &LeaseRow) -> Lease {
        let wrong = lease.slices.iter().find_map(|slice| {
            let row = self.quarantine.get(&slice.gpu)?;
            Some(format!("{}: {}", self.place(&slice.node, slice.gpu_index), row.reason))
        });
        Lease { trouble: wrong, ..lease.to_api() }
    }

    fn boot_of(&self, node: &str) -> String {
        let known = self.nodes.get(node).and_then(|machine| machine.row.as_ref());
        known.map_or_else(|| self.boot.clone(), |row| row.boot.clone())
    }
}
