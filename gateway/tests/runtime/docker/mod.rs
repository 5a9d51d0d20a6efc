//! What is Docker's own.

mod engine;
mod hostile;
mod isolation;
mod lifecycle;
mod outage;
