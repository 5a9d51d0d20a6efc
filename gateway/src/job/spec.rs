//! What a submission may say, and what is filled in where it says nothing. Pure.

use super::JobError;
use crate::{
    config::{Container, JobSettings},
    store::{GREATEST_PRIORITY, UserRecord},
};
use mlad::api::{JobSpec, Need, Role};
use mlad_allocator::LeaseRequest;

/// Words of a command.
const MAX_WORDS: usize = 1024;
/// Bytes of a command, all words together.
const MAX_COMMAND: usize = 128 * 1024;
/// Variables of an environment.
const MAX_VARIABLES: usize = 256;
/// Bytes of an environment, names and values together.
const MAX_ENVIRONMENT: usize = 64 * 1024;
/// Bytes of a path.
const MAX_PATH: usize = 4096;
/// Characters of a name or an idempotency key.
const MAX_NAME: usize = 128;
/// Least memory a container can be given, in MiB.
const MIN_MEMORY_MIB: u64 = 16;

/// Checks a submission and fills in what the settings say where it says nothing. Image and slice have been
/// filled in before: they depend on who asks.
///
/// # Errors
/// [`JobError::Spec`] says which part is wrong and what would be right.
pub(super) fn complete(mut spec: JobSpec, job: &JobSettings, container: &Container) -> Result<JobSpec, JobError> {
    check_command(&spec.command)?;
    check_environment(&spec)?;
    for (what, text) in
        [("name", &spec.name), ("idempotency key", &spec.idempotency_key), ("reservation", &spec.reservation)]
    {
        if text.as_ref().is_some_and(|text| !is_line(text)) {
            return wrong(format!("the {what} must be one line of 1 to {MAX_NAME} characters"));
        }
    }
    if let Some(path) = &spec.working_directory
        && (!path.starts_with('/') || path.len() > MAX_PATH || path.contains('\0'))
    {
        return wrong("the working directory must be an absolute path".into());
    }
    let most = job.max_time_limit_minutes.saturating_mul(60);
    let limit = spec.time_limit_seconds.unwrap_or_else(|| job.time_limit_minutes.saturating_mul(60).min(most));
    if limit == 0 || limit > most {
        return wrong(format!("the time limit must be 1 to {most} seconds, and is {limit}"));
    }
    let memory = spec.memory_mib.unwrap_or(container.memory_mib);
    if !(MIN_MEMORY_MIB..=container.max_memory_mib).contains(&memory) {
        let most = container.max_memory_mib;
        return wrong(format!("the memory must be {MIN_MEMORY_MIB} to {most} MiB, and is {memory}"));
    }
    check_slices(&spec)?;
    spec.time_limit_seconds = Some(limit);
    spec.memory_mib = Some(memory);
    spec.need = spec.need.or(Some(Need::Cpu));
    Ok(spec)
}

/// Refuses a priority that the user may not ask for.
///
/// # Errors
/// [`JobError::Priority`] when it is too great, [`JobError::Spec`] when it is none.
pub(super) fn check_priority(spec: &JobSpec, user: &UserRecord) -> Result<(), JobError> {
    let wanted = spec.priority;
    if !(-GREATEST_PRIORITY..=GREATEST_PRIORITY).contains(&wanted) {
        return wrong(format!("a priority is -{GREATEST_PRIORITY} to {GREATEST_PRIORITY}, and not {wanted}"));
    }
    let most = match user.role {
        Role::Admin => GREATEST_PRIORITY,
        Role::User => user.quota.greatest_priority.unwrap_or(0),
    };
    if wanted > most { Err(JobError::Priority { wanted, most }) } else { Ok(()) }
}

fn check_slices(spec: &JobSpec) -> Result<(), JobError> {
    let (slices, most) = (spec.slices.unwrap_or(1), LeaseRequest::MOST_SLICES);
    if !(1..=most).contains(&slices) {
        return wrong(format!("a job has 1 to {most} slices, and not {slices}"));
    }
    if slices > 1 && matches!(spec.need, None | Some(Need::Cpu)) {
        return wrong(format!("{slices} slices of nothing were asked for: name one with --gpu"));
    }
    match spec.nodes {
        None | Some(1) => Ok(()),
        Some(0) => wrong("a job runs on one node at least".into()),
        Some(nodes) => wrong(format!(
            "a job on {nodes} nodes was asked for, and the containers of this installation are on one node each: ask \
             for several slices on one node (--slices without --nodes), or hand in several jobs"
        )),
    }
}

fn check_command(command: &[String]) -> Result<(), JobError> {
    let bytes: usize = command.iter().map(|word| word.len() + 1).sum();
    if command.is_empty() || command.len() > MAX_WORDS || bytes > MAX_COMMAND {
        return wrong(format!("a command has 1 to {MAX_WORDS} words and at most {MAX_COMMAND} bytes"));
    }
    if command.first().is_some_and(String::is_empty) || command.iter().any(|word| word.contains('\0')) {
        return wrong("a command's first word is not empty, and no word has a zero byte".into());
    }
    Ok(())
}

fn check_environment(spec: &JobSpec) -> Result<(), JobError> {
    let bytes: usize = spec.environment.iter().map(|(name, value)| name.len() + value.len() + 2).sum();
    if spec.environment.len() > MAX_VARIABLES || bytes > MAX_ENVIRONMENT {
        return wrong(format!("an environment has at most {MAX_VARIABLES} variables and {MAX_ENVIRONMENT} bytes"));
    }
    for (name, value) in &spec.environment {
        let first = name.starts_with(|first: char| first.is_ascii_alphabetic() || first == '_');
        if !first || !name.chars().all(|other| other.is_ascii_alphanumeric() || other == '_') {
            let name: String = name.chars().take(64).collect();
            return wrong(format!("{name:?} cannot name a variable: letters, digits and _, no digit first"));
        }
        if name.starts_with("MLAD_") {
            return wrong(format!("the variable {name} is MLAD's own: take a name without MLAD_"));
        }
        if value.contains('\0') {
            return wrong(format!("the value of the variable {name} has a zero byte"));
        }
    }
    Ok(())
}

fn is_line(text: &str) -> bool {
    (1..=MAX_NAME).contains(&text.chars().count()) && !text.chars().any(char::is_control)
}

fn wrong<T>(message: String) -> Result<T, JobError> {
    Err(JobError::Spec(message))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(json: &str) -> Result<JobSpec, JobError> {
        complete(serde_json::from_str(json).unwrap(), &JobSettings::default(), &Container::default())
    }

    #[test]
    fn what_is_left_out_is_filled_in() {
        let spec = spec(r#"{"command": ["true"]}"#).unwrap();
        assert_eq!(spec.time_limit_seconds, Some(24 * 3600));
        assert_eq!(spec.memory_mib, Some(16 * 1024));
        assert_eq!(spec.need, Some(Need::Cpu));
    }

    #[test]
    fn what_is_wrong_is_refused_by_name() {
        for (json, part) in [
            (r#"{"command": []}"#, "command"),
            (r#"{"command": [""]}"#, "command"),
            (r#"{"command": ["a\u0000b"]}"#, "zero byte"),
            (r#"{"command": ["true"], "working_directory": "home"}"#, "working directory"),
            (r#"{"command": ["true"], "environment": {"1A": ""}}"#, "1A"),
            (r#"{"command": ["true"], "environment": {"A=B": ""}}"#, "A=B"),
            (r#"{"command": ["true"], "environment": {"MLAD_JOB_ID": "7"}}"#, "MLAD_JOB_ID"),
            (r#"{"command": ["true"], "environment": {"A": "\u0000"}}"#, "zero byte"),
            (r#"{"command": ["true"], "name": "two\nlines"}"#, "name"),
            (r#"{"command": ["true"], "idempotency_key": ""}"#, "idempotency key"),
            (r#"{"command": ["true"], "time_limit_seconds": 0}"#, "time limit"),
            (r#"{"command": ["true"], "time_limit_seconds": 99999999}"#, "time limit"),
            (r#"{"command": ["true"], "need": "gpu", "slices": 0}"#, "slices"),
            (r#"{"command": ["true"], "need": "gpu", "slices": 9999}"#, "slices"),
            (r#"{"command": ["true"], "slices": 2}"#, "--gpu"),
            (r#"{"command": ["true"], "need": "gpu", "slices": 4, "nodes": 2}"#, "on one node"),
            (r#"{"command": ["true"], "memory_mib": 1}"#, "memory"),
            (r#"{"command": ["true"], "memory_mib": 99999999}"#, "memory"),
        ] {
            let message = spec(json).unwrap_err().to_string();
            assert!(message.contains(part), "{json}: {message}");
        }
    }
}
