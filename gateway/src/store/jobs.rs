//! Jobs and their attempts. A job changes by [`Store::change_job`] alone: a guarded update that happens once.

use super::{Store, StoreError, from_micros, to_micros};
use crate::job::{AttemptName, Life, word};
use jiff::{SignedDuration, Timestamp};
use mlad::api::{Attempt, JobId, JobReason, JobSpec, JobState, Lease};
use serde::{Serialize, de::DeserializeOwned};
use sqlx::{QueryBuilder, Row as _, Sqlite, sqlite::SqliteRow};
use std::collections::HashMap;

/// How long an idempotency key stands for the job it was first used with.
const KEY_LIFE: SignedDuration = SignedDuration::from_hours(24);

/// A job as it is stored.
#[derive(Debug, Clone, PartialEq)]
pub struct JobRecord {
    /// Its number.
    pub id: JobId,
    /// The user it belongs to, by number.
    pub user_id: i64,
    /// The same by name.
    pub user: String,
    /// Name for people.
    pub name: String,
    /// What was submitted, with the defaults filled in.
    pub spec: JobSpec,
    /// When it was accepted.
    pub submitted_at: Timestamp,
    /// Everything that changes.
    pub life: Life,
}

impl JobRecord {
    /// The workload of the current attempt, if one was made.
    pub fn current(&self) -> Option<AttemptName> {
        (self.life.attempt > 0).then_some(AttemptName { job: self.id, number: self.life.attempt })
    }

    /// The workload of the attempt to come.
    pub fn next(&self) -> AttemptName {
        AttemptName { job: self.id, number: self.life.attempt.saturating_add(1) }
    }
}

/// What became of a submission.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Submission {
    /// It is stored under this number.
    New(JobId),
    /// The key was used before, for this job.
    Same(JobId),
    /// The key was used before, for another command.
    OtherCommand(JobId),
    /// The user has this many jobs that have not ended: all that are allowed.
    TooMany(u32),
}

/// Which jobs to list.
#[derive(Debug, Clone, Default)]
pub struct JobFilter {
    /// Only this user's.
    pub user_id: Option<i64>,
    /// Only in one of these states; in any if empty.
    pub states: Vec<JobState>,
    /// Only those with a smaller number.
    pub before: Option<JobId>,
    /// At most so many.
    pub limit: u32,
}

impl Store {
    /// Stores a job; durable when it returns. `most` bounds the user's jobs that have not ended.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn submit_job(&self, user_id: i64, spec: &JobSpec, most: u32) -> Result<Submission, StoreError> {
        let now = Timestamp::now();
        let mut transaction = self.write().await?;
        if let Some(key) = &spec.idempotency_key {
            let row =
                sqlx::query("SELECT id, submitted_at, spec FROM jobs WHERE user_id = $1 AND idempotency_key = $2")
                    .bind(user_id)
                    .bind(key)
                    .fetch_optional(&mut *transaction)
                    .await?;
            if let Some(row) = row {
                let id: JobId = row.try_get("id")?;
                if from_micros(row.try_get("submitted_at")?)? > now - KEY_LIFE {
                    let earlier: JobSpec = from_json("job", row.try_get("spec")?)?;
                    let same = earlier.command == spec.command;
                    return Ok(if same { Submission::Same(id) } else { Submission::OtherCommand(id) });
                }
                sqlx::query("UPDATE jobs SET idempotency_key = NULL WHERE id = $1")
                    .bind(id)
                    .execute(&mut *transaction)
                    .await?;
            }
        }
        let live: u32 = sqlx::query_scalar("SELECT COUNT(*) FROM jobs WHERE user_id = $1 AND ended_at IS NULL")
            .bind(user_id)
            .fetch_one(&mut *transaction)
            .await?;
        if live >= most {
            return Ok(Submission::TooMany(live));
        }
        let life = Life::submitted(spec.hold);
        let name = spec.name.clone().or_else(|| spec.command.first().cloned()).unwrap_or_default();
        let id = sqlx::query_scalar(
            "INSERT INTO jobs (user_id, name, state, reason, spec, idempotency_key, submitted_at)
             VALUES ($1, $2, $3, $4, $5, $6, $7) RETURNING id",
        )
        .bind(user_id)
        .bind(name)
        .bind(word(life.state))
        .bind(life.reason.as_ref().map(to_word).transpose()?)
        .bind(to_json(spec)?)
        .bind(&spec.idempotency_key)
        .bind(to_micros(now))
        .fetch_one(&mut *transaction)
        .await?;
        transaction.commit().await?;
        Ok(Submission::New(id))
    }

    /// One job.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] when there is none of that number.
    pub async fn job(&self, id: JobId) -> Result<JobRecord, StoreError> {
        let row =
            sqlx::query("SELECT j.*, u.name AS user FROM jobs j JOIN users u ON u.id = j.user_id WHERE j.id = $1")
                .bind(id)
                .fetch_optional(self.read())
                .await?
                .ok_or_else(|| StoreError::NotFound { kind: "job", name: id.to_string() })?;
        record(&row)
    }

    /// Jobs, newest first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn jobs(&self, filter: &JobFilter) -> Result<Vec<JobRecord>, StoreError> {
        let mut query: QueryBuilder<Sqlite> =
            QueryBuilder::new("SELECT j.*, u.name AS user FROM jobs j JOIN users u ON u.id = j.user_id WHERE 1 = 1");
        if let Some(user_id) = filter.user_id {
            query.push(" AND j.user_id = ").push_bind(user_id);
        }
        if let Some(before) = filter.before {
            query.push(" AND j.id < ").push_bind(before);
        }
        if !filter.states.is_empty() {
            query.push(" AND j.state IN (");
            let mut words = query.separated(", ");
            for state in &filter.states {
                words.push_bind(word(*state));
            }
            query.push(")");
        }
        query.push(" ORDER BY j.id DESC LIMIT ").push_bind(filter.limit);
        query.build().fetch_all(self.read()).await?.iter().map(record).collect()
    }

    /// The numbers of all jobs that have not ended, oldest first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn live_jobs(&self) -> Result<Vec<JobId>, StoreError> {
        Ok(sqlx::query_scalar("SELECT id FROM jobs WHERE ended_at IS NULL ORDER BY id").fetch_all(self.read()).await?)
    }

    /// How many jobs of a user have not ended.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn count_live_jobs(&self, user_id: i64) -> Result<u32, StoreError> {
        Ok(sqlx::query_scalar("SELECT COUNT(*) FROM jobs WHERE user_id = $1 AND ended_at IS NULL")
            .bind(user_id)
            .fetch_one(self.read())
            .await?)
    }

    /// The attempts of some jobs, first to last.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn attempts(&self, jobs: &[JobId]) -> Result<HashMap<JobId, Vec<Attempt>>, StoreError> {
        let mut attempts: HashMap<JobId, Vec<Attempt>> = HashMap::new();
        if jobs.is_empty() {
            return Ok(attempts);
        }
        let mut query: QueryBuilder<Sqlite> = QueryBuilder::new("SELECT * FROM attempts WHERE job_id IN (");
        let mut ids = query.separated(", ");
        for id in jobs {
            ids.push_bind(*id);
        }
        query.push(") ORDER BY job_id, number");
        for row in query.build().fetch_all(self.read()).await? {
            attempts.entry(row.try_get("job_id")?).or_default().push(attempt(&row)?);
        }
        Ok(attempts)
    }

    /// The lease of one attempt.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] when the attempt was never granted one.
    pub async fn lease_of(&self, name: AttemptName) -> Result<Lease, StoreError> {
        let text: Option<String> = sqlx::query_scalar("SELECT lease FROM attempts WHERE job_id = $1 AND number = $2")
            .bind(name.job)
            .bind(name.number)
            .fetch_optional(self.read())
            .await?;
        from_json("lease", &text.ok_or(StoreError::NotFound { kind: "attempt", name: name.to_string() })?)
    }

    /// Moves a job from one life to the next, if it still is where `from` says; durable when it returns.
    /// A job that starts brings its lease: lease, fence and attempt number are one transaction with the state.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] when somebody else moved it first: read it again.
    pub async fn change_job(&self, id: JobId, from: &Life, to: &Life, lease: Option<&Lease>) -> Result<(), StoreError> {
        let mut transaction = self.write().await?;
        let changed = sqlx::query(
            "UPDATE jobs SET state = $1, reason = $2, detail = $3, attempt = $4, started_at = $5, ended_at = $6,
                    exit_code = $7, signal = $8, cancelled_by = $9
             WHERE id = $10 AND state = $11 AND attempt = $12",
        )
        .bind(word(to.state))
        .bind(to.reason.as_ref().map(to_word).transpose()?)
        .bind(&to.detail)
        .bind(to.attempt)
        .bind(to.started_at.map(to_micros))
        .bind(to.ended_at.map(to_micros))
        .bind(to.exit_code)
        .bind(&to.signal)
        .bind(&to.cancelled_by)
        .bind(id)
        .bind(word(from.state))
        .bind(from.attempt)
        .execute(&mut *transaction)
        .await?
        .rows_affected();
        if changed == 0 {
            return Err(StoreError::Conflict(format!("job {id} is not {} any more", word(from.state))));
        }
        if let Some(lease) = lease {
            sqlx::query("INSERT INTO attempts (job_id, number, fence, lease, granted_at) VALUES ($1, $2, $3, $4, $5)")
                .bind(id)
                .bind(to.attempt)
                .bind(i64::try_from(lease.fence).unwrap_or(i64::MAX))
                .bind(to_json(lease)?)
                .bind(to_micros(lease.granted_at))
                .execute(&mut *transaction)
                .await?;
        } else if to.attempt > 0 {
            let over =
                !matches!(to.state, JobState::Starting | JobState::Running | JobState::Lost | JobState::Cancelling);
            sqlx::query(
                "UPDATE attempts SET started_at = COALESCE(started_at, $1), ended_at = COALESCE(ended_at, $2),
                     preempted = preempted OR $5
                 WHERE job_id = $3 AND number = $4",
            )
            .bind(to.started_at.map(to_micros))
            .bind(over.then(|| to_micros(Timestamp::now())))
            .bind(id)
            .bind(to.attempt)
            .bind(to.state == JobState::Queued && to.reason == Some(JobReason::Preempted))
            .execute(&mut *transaction)
            .await?;
        }
        transaction.commit().await?;
        Ok(())
    }
}

fn record(row: &SqliteRow) -> Result<JobRecord, StoreError> {
    let time = |column: &str| -> Result<Option<Timestamp>, StoreError> {
        row.try_get::<Option<i64>, _>(column)?.map(from_micros).transpose()
    };
    let reason: Option<&str> = row.try_get("reason")?;
    Ok(JobRecord {
        id: row.try_get("id")?,
        user_id: row.try_get("user_id")?,
        user: row.try_get("user")?,
        name: row.try_get("name")?,
        spec: from_json("job", row.try_get("spec")?)?,
        submitted_at: from_micros(row.try_get("submitted_at")?)?,
        life: Life {
            state: from_word("job state", row.try_get("state")?)?,
            reason: reason.map(|word| from_word::<JobReason>("job reason", word)).transpose()?,
            detail: row.try_get("detail")?,
            attempt: row.try_get("attempt")?,
            started_at: time("started_at")?,
            ended_at: time("ended_at")?,
            exit_code: row.try_get("exit_code")?,
            signal: row.try_get("signal")?,
            cancelled_by: row.try_get("cancelled_by")?,
        },
    })
}

fn attempt(row: &SqliteRow) -> Result<Attempt, StoreError> {
    let lease: Lease = from_json("lease", row.try_get("lease")?)?;
    let number = row.try_get("number")?;
    let time = |column: &str| -> Result<Option<Timestamp>, StoreError> {
        row.try_get::<Option<i64>, _>(column)?.map(from_micros).transpose()
    };
    Ok(Attempt {
        number,
        workload: AttemptName { job: row.try_get("job_id")?, number }.to_string(),
        fence: lease.fence,
        node: lease.node,
        uuids: lease.uuids,
        granted_at: lease.granted_at,
        started_at: time("started_at")?,
        ended_at: time("ended_at")?,
        preempted: row.try_get("preempted")?,
    })
}

fn to_json<T: Serialize>(value: &T) -> Result<String, StoreError> {
    serde_json::to_string(value).map_err(|error| StoreError::Corrupt { what: "value", reason: error.to_string() })
}

fn from_json<T: DeserializeOwned>(what: &'static str, text: &str) -> Result<T, StoreError> {
    serde_json::from_str(text).map_err(|error| StoreError::Corrupt { what, reason: error.to_string() })
}

/// The API's word for a reason.
fn to_word<T: Serialize>(value: &T) -> Result<String, StoreError> {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => Ok(word),
        other => Err(StoreError::Corrupt { what: "word", reason: format!("{other:?}") }),
    }
}

fn from_word<T: DeserializeOwned>(what: &'static str, word: &str) -> Result<T, StoreError> {
    serde_json::from_value(word.into()).map_err(|error| StoreError::Corrupt { what, reason: error.to_string() })
}
