//! Login names: `mlad`, `mlad+NAME`, `alice`, `alice+NAME`. Pure.

use super::width::clean;
use crate::{store::check_user_name, workspace};

/// The workspace of a login that names none.
pub const DEFAULT_WORKSPACE: &str = "default";
/// Most characters of a bad name that are repeated.
const MAX_SHOWN: usize = 64;

/// What a login name says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoginName {
    /// The user it names; none if it is the shared one, and the key says who it is.
    pub user: Option<String>,
    /// The workspace; `default` if it names none.
    pub workspace: String,
}

/// Why a text is no login name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LoginError {
    /// The user's part.
    #[error("`{0}` is no login name: a lower-case letter, then lower-case letters, digits, - or _; at most 32")]
    User(String),
    /// The workspace's part.
    #[error("`{0}` is no name of a workspace: 1 to 32 of a-z, 0-9, - and _")]
    Workspace(String),
}

/// Reads a login name, where `shared` is the one that is everybody's.
///
/// # Errors
/// When either part is no name.
pub fn parse_login(name: &str, shared: &str) -> Result<LoginName, LoginError> {
    let (user, workspace) = name.split_once('+').unwrap_or((name, DEFAULT_WORKSPACE));
    let user = if user == shared {
        None
    } else if check_user_name(user).is_ok() {
        Some(user.to_owned())
    } else {
        return Err(LoginError::User(clean(user, MAX_SHOWN)));
    };
    workspace::check_name(workspace).map_err(|_| LoginError::Workspace(clean(workspace, MAX_SHOWN)))?;
    Ok(LoginName { user, workspace: workspace.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn login(user: Option<&str>, workspace: &str) -> Result<LoginName, LoginError> {
        Ok(LoginName { user: user.map(str::to_owned), workspace: workspace.to_owned() })
    }

    #[test]
    fn names_and_workspaces_are_told_apart() {
        assert_eq!(parse_login("mlad", "mlad"), login(None, "default"));
        assert_eq!(parse_login("mlad+train-2", "mlad"), login(None, "train-2"));
        assert_eq!(parse_login("alice", "mlad"), login(Some("alice"), "default"));
        assert_eq!(parse_login("alice+x_1", "mlad"), login(Some("alice"), "x_1"));
        assert_eq!(parse_login("gpu", "gpu"), login(None, "default"));
    }

    #[test]
    fn bad_names_are_refused_and_shown_without_what_a_terminal_obeys() {
        for name in ["", "+x", "Alice", "1a", "al ice", "alice/../bob", "root\0", &"a".repeat(33)] {
            assert!(matches!(parse_login(name, "mlad"), Err(LoginError::User(_))), "{name}");
        }
        for name in ["mlad+", "mlad+a+b", "mlad+A", "alice+ü", "mlad+..", &format!("mlad+{}", "a".repeat(33))] {
            assert!(matches!(parse_login(name, "mlad"), Err(LoginError::Workspace(_))), "{name}");
        }
        assert_eq!(parse_login("mlad+\x1b[31mred", "mlad"), Err(LoginError::Workspace("[31mred".into())));
    }

    proptest! {
        #[test]
        fn no_name_is_repeated_at_length_or_with_control_characters(name in "\\PC{0,40}|(?s).{0,200}") {
            if let Err(error) = parse_login(&name, "mlad") {
                let text = error.to_string();
                prop_assert!(text.chars().count() < 200 && !text.chars().any(char::is_control), "{text:?}");
            }
        }
    }
}
