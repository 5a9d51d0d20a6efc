//! What of a GPU is held.

use crate::geometry::{Columns, Model, Placed};

/// What of a GPU is held, in leases or otherwise: all that the cost of a placement may depend on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Layout {
    columns: Columns,
    blocked: Columns,
    /// Sorted, each once.
    placed: Vec<Placed>,
}

impl Layout {
    /// The columns that are taken, blocked ones included.
    pub fn columns(&self) -> Columns {
        self.columns
    }

    /// The columns that are taken by nothing that ends.
    pub fn blocked(&self) -> Columns {
        self.blocked
    }

    /// The instances that are held.
    pub fn placed(&self) -> &[Placed] {
        &self.placed
    }

    /// The columns of each instance that is held.
    pub fn spans<'a>(&'a self, model: &'a Model) -> impl Iterator<Item = Columns> + Clone + 'a {
        self.placed.iter().filter_map(|placed| model.profile(placed.profile)?.span_at(placed.start))
    }

    /// Makes it `blocked` and these instances, which are sorted.
    pub(super) fn reset(&mut self, blocked: Columns, placed: impl Iterator<Item = (Placed, Columns)>) {
        (self.columns, self.blocked) = (blocked, blocked);
        self.placed.clear();
        for (placed, span) in placed {
            self.columns |= span;
            self.placed.push(placed);
        }
    }
}
