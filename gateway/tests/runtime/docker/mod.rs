//! What is Docker's own.

mod hostile;
mod isolation;
mod lifecycle;
mod outage;
