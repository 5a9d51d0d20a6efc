//! The catalog of images: `catalog.toml`, and over it what administrators added, replaced or hid.
//!
//! Not here: how an image is fetched or run. The runtime is asked only whether it has one.

mod entry;
mod file;

pub use entry::{CatalogEntry, check_name, check_reference};

use crate::{
    config::Config,
    runtime::{Runtime, RuntimeError},
    store::{Store, StoreError, StoredImage, UserRecord},
};
use futures::{StreamExt as _, TryStreamExt as _};
use mlad::api::{Image, Role};
use std::{
    path::PathBuf,
    sync::{Arc, PoisonError, RwLock},
};

/// Most entries, file and database together.
const MAX_ENTRIES: usize = 256;

/// Questions to the runtime at once, to list images.
const LOOKUPS: usize = 16;

/// What can go wrong with the catalog.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// Nobody has an image of that name, or this user may not see it.
    #[error("there is no image {name}{}", hint(.closest.as_deref(), .known))]
    Unknown {
        /// What was asked for.
        name: String,
        /// The name that is most like it.
        closest: Option<String>,
        /// The names there are.
        known: Vec<String>,
    },
    /// A name, reference or description that an entry cannot have.
    #[error("{0}")]
    Invalid(String),
    /// The catalog file cannot be read or is wrong; the text names line and key.
    #[error("{}: {message}", path.display())]
    File {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// The database fails.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The runtime does not say which images it has.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
}

fn hint(closest: Option<&str>, known: &[String]) -> String {
    match (closest, known) {
        (Some(closest), _) => format!(": did you mean {closest}? There are: {}", known.join(", ")),
        (None, []) => ": the catalog is empty; an administrator can add one".to_owned(),
        (None, _) => format!("; there are: {}", known.join(", ")),
    }
}

/// The catalog. What an administrator changes holds from the next look on; the file is read again by
/// [`Catalog::reload`].
#[derive(Debug)]
pub struct Catalog {
    path: PathBuf,
    file: RwLock<Arc<Vec<CatalogEntry>>>,
    store: Store,
}

impl Catalog {
    /// Reads the catalog file.
    ///
    /// # Errors
    /// When the file cannot be read or is wrong.
    pub fn load(config: &Config, store: Store) -> Result<Self, ImageError> {
        let entries = file::read(&config.catalog)?;
        Ok(Self { path: config.catalog.clone(), file: RwLock::new(Arc::new(entries)), store })
    }

    /// Reads the catalog file, to know whether it is right.
    ///
    /// # Errors
    /// When the file cannot be read or is wrong.
    pub fn check(config: &Config) -> Result<(), ImageError> {
        file::read(&config.catalog).map(drop)
    }

    /// Reads the catalog file again; returns how many entries it has.
    ///
    /// # Errors
    /// When it cannot be read or is wrong: the entries read before stay.
    pub fn reload(&self) -> Result<usize, ImageError> {
        let entries = file::read(&self.path)?;
        let count = entries.len();
        *self.file.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(entries);
        Ok(count)
    }

    /// The entry of that name.
    ///
    /// # Errors
    /// [`ImageError::Unknown`] names what exists.
    pub async fn get(&self, name: &str) -> Result<CatalogEntry, ImageError> {
        find(self.entries().await?, name)
    }

    /// The entry of that name, if this user may use it.
    ///
    /// # Errors
    /// [`ImageError::Unknown`] names what they may use.
    pub async fn get_for(&self, user: &UserRecord, name: &str) -> Result<CatalogEntry, ImageError> {
        find(self.entries_for(&user.name, user.role).await?, name)
    }

    /// All images, with what the runtime has of them.
    ///
    /// # Errors
    /// When the database or the runtime fails.
    pub async fn list(&self, runtime: &dyn Runtime) -> Result<Vec<Image>, ImageError> {
        look_up(self.entries().await?, runtime).await
    }

    /// The images this user may use, with what the runtime has of them.
    ///
    /// # Errors
    /// When the database or the runtime fails.
    pub async fn list_for(&self, user: &str, role: Role, runtime: &dyn Runtime) -> Result<Vec<Image>, ImageError> {
        look_up(self.entries_for(user, role).await?, runtime).await
    }

    /// The entries this user may use, without asking the runtime.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn entries_for(&self, user: &str, role: Role) -> Result<Vec<CatalogEntry>, ImageError> {
        let mut entries = self.entries().await?;
        entries.retain(|entry| entry.allows(user, role));
        Ok(entries)
    }

    /// Adds an image for everybody, or replaces the entry of its name; who may use one of the catalog file stays.
    ///
    /// # Errors
    /// When name, reference or description is wrong, the catalog is full, or the database fails.
    pub async fn add(&self, entry: &CatalogEntry) -> Result<(), ImageError> {
        entry.check()?;
        if !entry.allowed_users.is_empty() {
            return Err(ImageError::Invalid("an image for some users only belongs into the catalog file".to_owned()));
        }
        let entries = self.entries().await?;
        if entries.len() >= MAX_ENTRIES && !entries.iter().any(|other| other.name == entry.name) {
            return Err(ImageError::Invalid(format!("the catalog is full: {MAX_ENTRIES} images; remove one first")));
        }
        let image = StoredImage {
            reference: entry.reference.clone(),
            description: entry.description.clone(),
            min_gpu_memory_mib: entry.min_gpu_memory_mib,
        };
        Ok(self.store.put_image(&entry.name, &image).await?)
    }

    /// Takes an image out of the catalog: one that was added is forgotten, one of the catalog file is hidden
    /// until [`Catalog::restore`]. The engine keeps the image, and what runs goes on.
    ///
    /// # Errors
    /// [`ImageError::Unknown`], or when the database fails.
    pub async fn remove(&self, name: &str) -> Result<(), ImageError> {
        find(self.entries().await?, name)?;
        if self.file().iter().any(|entry| entry.name == name) {
            Ok(self.store.hide_image(name).await?)
        } else {
            Ok(self.store.forget_image(name).await?)
        }
    }

    /// Lets what the catalog file says of a name hold again, after [`Catalog::remove`] or [`Catalog::add`].
    ///
    /// # Errors
    /// [`ImageError::Unknown`] when the file does not have it; when nothing was changed about the name, or the
    /// database fails.
    pub async fn restore(&self, name: &str) -> Result<CatalogEntry, ImageError> {
        let entry = find(self.file().as_ref().clone(), name)?;
        self.store.forget_image(name).await?;
        Ok(entry)
    }

    fn file(&self) -> Arc<Vec<CatalogEntry>> {
        Arc::clone(&self.file.read().unwrap_or_else(PoisonError::into_inner))
    }

    async fn entries(&self) -> Result<Vec<CatalogEntry>, ImageError> {
        let mut entries = self.file().as_ref().clone();
        for record in self.store.images().await? {
            let at = entries.iter().position(|entry| entry.name == record.name);
            let entry = record.image.map(|image| CatalogEntry {
                name: record.name,
                reference: image.reference,
                description: image.description,
                min_gpu_memory_mib: image.min_gpu_memory_mib,
                // A newer image of one that is for some only is not for everybody.
                allowed_users: at
                    .and_then(|at| entries.get(at))
                    .map(|entry| entry.allowed_users.clone())
                    .unwrap_or_default(),
            });
            match (at, entry) {
                (Some(at), Some(entry)) => {
                    entries.splice(at..=at, [entry]);
                }
                (None, Some(entry)) => entries.push(entry),
                (Some(at), None) => {
                    entries.remove(at);
                }
                (None, None) => {}
            }
        }
        Ok(entries)
    }
}

fn find(mut entries: Vec<CatalogEntry>, name: &str) -> Result<CatalogEntry, ImageError> {
    if let Some(at) = entries.iter().position(|entry| entry.name == name) {
        return Ok(entries.swap_remove(at));
    }
    let name: String = name.chars().take(entry::MAX_NAME).filter(|letter| !letter.is_control()).collect();
    let known: Vec<String> = entries.into_iter().map(|entry| entry.name).collect();
    Err(ImageError::Unknown { closest: entry::closest(&name, &known), name, known })
}

async fn look_up(entries: Vec<CatalogEntry>, runtime: &dyn Runtime) -> Result<Vec<Image>, ImageError> {
    let lookups = entries.into_iter().map(|entry| async move {
        let digest = runtime.image_present(&entry.reference).await?;
        Ok(Image {
            name: entry.name,
            reference: entry.reference,
            available: digest.is_some(),
            digest,
            description: entry.description,
            min_gpu_memory_mib: entry.min_gpu_memory_mib,
        })
    });
    futures::stream::iter(lookups).buffered(LOOKUPS).try_collect().await
}

#[cfg(test)]
mod tests;
