//! What was: who held which slice at a time, and what was used. Of others' work only the name, the slice and the time
//! are shown; of what was used, everybody's own and that of their projects.

use super::{
    Rooms,
    caller::{Asked, Caller},
    failure::{Answer, Failure},
    view::kind,
};
use axum::{Json, extract::State};
use jiff::{Timestamp, civil::Date};
use mlad::api::{ErrorCode, Past, Usage, UsageList};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use utoipa::IntoParams;
use utoipa_axum::{router::OpenApiRouter, routes};

pub(super) fn routes() -> OpenApiRouter<Rooms> {
    OpenApiRouter::new().routes(routes!(get_past)).routes(routes!(get_usage))
}

/// Which time is asked for.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
struct At {
    /// The time.
    at: Timestamp,
}

/// Which use is asked for.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
struct UsageQuery {
    /// The first day, UTC.
    #[param(value_type = String, format = Date)]
    from: Date,
    /// The last day.
    #[param(value_type = String, format = Date)]
    to: Date,
    /// What it is told apart by: `day`, `user`, `project`, or several of them with commas; `day,user,project` if absent.
    by: Option<String>,
    /// Of this user only.
    user: Option<String>,
    /// Of this project only.
    project: Option<String>,
}

/// Who held slices at a time. Of others' leases, `workload` is only its kind, and the project absent unless the caller
/// is a member.
#[utoipa::path(get, path = "/v1/history", tag = "view", params(At), responses((status = 200, body = Past)))]
async fn get_past(State(state): State<Rooms>, caller: Caller, Asked(query): Asked<At>) -> Answer<Json<Past>> {
    if query.at > Timestamp::now() {
        return Err(Failure::new(ErrorCode::BadRequest, format!("{} has not been yet", query.at)));
    }
    let mine = projects_of(&state, &caller).await?;
    let mut past = state.allocator.past(query.at).await?;
    for lease in past.leases.iter_mut().filter(|lease| !caller.may_see(&lease.user)) {
        lease.workload = kind(&lease.workload).into();
        lease.project = lease.project.take().filter(|project| mine.contains(project));
        lease.reason = None;
    }
    Ok(Json(past))
}

/// What was used from one day to another: the caller's own and that of their projects; everybody's for administrators.
#[utoipa::path(get, path = "/v1/usage", tag = "view", params(UsageQuery), responses((status = 200, body = UsageList)))]
async fn get_usage(
    State(state): State<Rooms>,
    caller: Caller,
    Asked(query): Asked<UsageQuery>,
) -> Answer<Json<UsageList>> {
    let by = By::parse(query.by.as_deref()).map_err(|wrong| Failure::new(ErrorCode::BadRequest, wrong))?;
    let mine = projects_of(&state, &caller).await?;
    let mut list = state.allocator.usage(query.from, query.to).await?;
    list.usage.retain(|row| {
        let of_mine = row.project.as_ref().is_some_and(|project| mine.contains(project));
        let seen = of_mine || row.user.as_deref().is_some_and(|user| caller.may_see(user));
        let is = |wanted: &Option<String>, is: &Option<String>| wanted.is_none() || wanted == is;
        seen && is(&query.user, &row.user) && is(&query.project, &row.project)
    });
    list.usage = by.sums(list.usage);
    Ok(Json(list))
}

/// The projects that the caller is a member of.
async fn projects_of(state: &Rooms, caller: &Caller) -> Answer<BTreeSet<String>> {
    let members = state.store.project_members().await?;
    let projects = state.store.projects().await?.into_iter();
    let is_mine = |id| members.get(&id).is_some_and(|members| members.contains(&caller.0.user));
    Ok(projects.filter(|project| is_mine(project.id)).map(|project| project.name).collect())
}

/// What use is told apart by.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct By {
    day: bool,
    user: bool,
    project: bool,
}

impl By {
    fn parse(text: Option<&str>) -> Result<Self, String> {
        let mut by = Self::default();
        for word in text.unwrap_or("day,user,project").split(',') {
            match word {
                "day" => by.day = true,
                "user" => by.user = true,
                "project" => by.project = true,
                _ => {
                    let word: String = word.escape_debug().take(32).collect();
                    return Err(format!("`{word}`: use is told apart by `day`, `user` and `project`"));
                }
            }
        }
        Ok(by)
    }

    fn sums(self, rows: Vec<Usage>) -> Vec<Usage> {
        let mut sums: BTreeMap<_, Usage> = BTreeMap::new();
        for row in rows {
            let day = row.day.filter(|_| self.day);
            let user = row.user.filter(|_| self.user);
            let project = row.project.filter(|_| self.project);
            let key = (day, user.clone(), project.clone());
            let sum = sums.entry(key).or_insert_with(|| Usage { day, user, project, ..Usage::default() });
            sum.slice_seconds += row.slice_seconds;
            sum.compute_seconds += row.compute_seconds;
            sum.memory_seconds += row.memory_seconds;
            sum.gpu_seconds += row.gpu_seconds;
            sum.leases += row.leases;
        }
        sums.into_values().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(day: i8, user: &str, project: Option<&str>, seconds: u64) -> Usage {
        Usage {
            day: Some(jiff::civil::date(2026, 11, day)),
            user: Some(user.into()),
            project: project.map(Into::into),
            slice_seconds: seconds,
            leases: 1,
            ..Usage::default()
        }
    }

    #[test]
    fn use_is_summed_by_what_is_asked_for() {
        let rows =
            vec![row(1, "alice", None, 1), row(2, "alice", Some("vision"), 10), row(2, "bob", Some("vision"), 100)];
        let by = |text: &str| By::parse(Some(text)).unwrap().sums(rows.clone());
        let told = |text: &str| by(text).iter().map(|sum| sum.slice_seconds).collect::<Vec<_>>();
        assert_eq!(told("user"), [11, 100]);
        assert_eq!(told("project"), [1, 110]);
        assert_eq!(told("day"), [1, 110]);
        assert_eq!(told("day,user"), [1, 10, 100]);
        assert_eq!(by("user")[0].user.as_deref(), Some("alice"));
        assert_eq!((by("user")[0].day, by("user")[0].leases), (None, 2));
        assert!(By::parse(Some("user,moon")).unwrap_err().contains("moon"));
    }
}
