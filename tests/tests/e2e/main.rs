//! The end-to-end tests, by what a person does. One program, so that it is linked once and its tests take turns.
//!
//! `scripts/test e2e` runs them, `stalls` apart from the others; `kubernetes` are those of `scripts/test kubernetes`.

mod api;
mod bad_input;
mod clients;
mod crash;
mod files;
mod jobs;
mod kubernetes;
mod login;
mod manual;
mod oracle;
mod people;
mod projects;
mod service;
mod slices;
mod stalls;
mod tools;
mod waiting;
