//! `mlad-allocator check`: whether the ledger in a database is as it must be.

use anyhow::Context;
use mlad_allocator::{
    proof::{Allowance, Finding, check},
    read_records,
};
use serde_json::json;
use std::{io::Write, path::PathBuf};

/// Flags of `mlad-allocator check`.
#[derive(Debug, clap::Args)]
pub(crate) struct Flags {
    /// The SQLite database. The allocator that uses it may run on; nothing is changed.
    #[arg(long, value_name = "FILE", default_value = "/var/lib/mlad/allocator.db")]
    database: PathBuf,
    /// The clock of this machine was set back by so much at some time: no finding comes of that.
    #[arg(long, value_name = "SECONDS", default_value_t = 0, value_parser = clap::value_parser!(u32).range(..=31_536_000))]
    clock_set_back: u32,
    /// JSON instead of text.
    #[arg(long)]
    json: bool,
}

/// So many findings are printed as text; the rest is counted.
const TOLD: usize = 100;

/// Checks, and prints what was found. True if the ledger is as it must be.
pub(crate) async fn run(flags: &Flags) -> anyhow::Result<bool> {
    let records = read_records(&flags.database).await.with_context(|| flags.database.display().to_string())?;
    let clock_set_back_us = i64::from(flags.clock_set_back) * 1_000_000;
    let findings = check(&records, Allowance { clock_set_back_us, limits_changed: true });
    let sound = findings.iter().all(|finding| finding.explained);
    let (requests, leases) = (records.requests.len(), records.leases.len());
    let held = records.leases.iter().filter(|lease| lease.released_at.is_none()).count();
    let mut out = std::io::stdout().lock();
    if flags.json {
        let told =
            json!({ "sound": sound, "requests": requests, "leases": leases, "held": held, "findings": findings });
        writeln!(out, "{told}")?;
        return Ok(sound);
    }
    for Finding { rule, explained, detail } in findings.iter().take(TOLD) {
        let note = if *explained { " (in order if limits were lowered since)" } else { "" };
        writeln!(out, "{rule}: {detail}{note}")?;
    }
    if findings.len() > TOLD {
        writeln!(out, "… and {} more; --json tells all of them", findings.len() - TOLD)?;
    }
    let verdict = if sound { "the ledger is sound" } else { "the ledger is NOT sound; keep a copy of the database" };
    writeln!(out, "{requests} requests, {leases} leases, {held} of them held: {verdict}")?;
    Ok(sound)
}
