//! One entry of the catalog, and what it may say.

use super::ImageError;
use mlad::api::Role;
use serde::Deserialize;

/// Longest name, in characters.
pub(super) const MAX_NAME: usize = 64;
/// Longest reference, in characters.
const MAX_REFERENCE: usize = 255;
/// Longest description, in characters.
const MAX_DESCRIPTION: usize = 200;
/// How like a name must be to one that exists to be taken for a slip of the finger (1 is equal).
const LIKENESS: f64 = 0.75;

/// An image people can ask for.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CatalogEntry {
    /// The name people use.
    pub name: String,
    /// OCI reference, as the runtime knows it. Without a registry's host it is local: never fetched.
    pub reference: String,
    /// One line for people.
    pub description: String,
    /// Least GPU memory it needs, in MiB; 0 for none.
    #[serde(default)]
    pub min_gpu_memory_mib: u64,
    /// Who may use it, beside administrators; everybody if empty.
    #[serde(default)]
    pub allowed_users: Vec<String>,
}

impl CatalogEntry {
    /// Whether this user may use it.
    pub fn allows(&self, user: &str, role: Role) -> bool {
        self.allowed_users.is_empty() || role == Role::Admin || self.allowed_users.iter().any(|name| name == user)
    }

    pub(super) fn check(&self) -> Result<(), ImageError> {
        check_name(&self.name)?;
        check_reference(&self.reference)?;
        let description = &self.description;
        if description.chars().count() > MAX_DESCRIPTION || description.chars().any(char::is_control) {
            return Err(ImageError::Invalid(format!(
                "the description of image {} is not one line of at most {MAX_DESCRIPTION} characters",
                self.name
            )));
        }
        Ok(())
    }
}

/// Checks the name of an image: lower-case letters, digits, `-`, `_` and `.`, first a letter or digit.
///
/// # Errors
/// [`ImageError::Invalid`] says the rule.
pub fn check_name(name: &str) -> Result<(), ImageError> {
    let letter = |letter: char| letter.is_ascii_lowercase() || letter.is_ascii_digit();
    let good = name.starts_with(letter)
        && name.len() <= MAX_NAME
        && name.chars().all(|other| letter(other) || matches!(other, '-' | '_' | '.'));
    if good {
        return Ok(());
    }
    Err(ImageError::Invalid(format!(
        "{name:?} cannot name an image: lower-case letters, digits, '-', '_' and '.', first a letter or digit, at most \
         {MAX_NAME}"
    )))
}

/// Checks that text can be an OCI reference; whether it is one, the engine says.
///
/// # Errors
/// [`ImageError::Invalid`] says the rule.
pub fn check_reference(reference: &str) -> Result<(), ImageError> {
    let good = reference.starts_with(|first: char| first.is_ascii_alphanumeric())
        && reference.len() <= MAX_REFERENCE
        && reference
            .chars()
            .all(|letter| letter.is_ascii_alphanumeric() || matches!(letter, '-' | '_' | '.' | '/' | ':' | '@'))
        && !reference.contains("..")
        && !reference.contains("//");
    if good {
        return Ok(());
    }
    Err(ImageError::Invalid(format!(
        "{reference:?} is not an image reference such as mlad/base:1 or registry.example.org/team/image:2"
    )))
}

/// The name most like `name`, if any is like it at all.
pub(super) fn closest(name: &str, known: &[String]) -> Option<String> {
    known
        .iter()
        .map(|other| (strsim::jaro_winkler(&name.to_lowercase(), other), other))
        .filter(|(likeness, _)| *likeness >= LIKENESS)
        .max_by(|one, other| one.0.total_cmp(&other.0))
        .map(|(_, other)| other.clone())
}
