//! A login with a terminal, from the first question to the greeting.

use super::{
    Entered, LoginEnd, Terminal,
    console::{Console, Event},
    greeting::{Situation, greeting},
    keys::Keys,
    menu::{Menu, Pressed},
    progress::Doing,
    text,
};
use crate::{
    store::UserRecord,
    workspace::{Attached, Clock, Entering, Progress, Wish, WorkspaceError, Workspaces, later},
};
use mlad::api::{Gpu, Need};
use std::{io, time::Duration};

/// How long the greeting waits for what the allocator has to say.
const GREETING_PATIENCE: Duration = Duration::from_secs(2);
/// Between two drawings of the line with the clock.
const TICK: Duration = Duration::from_secs(1);

/// Brings a person with a terminal to their workspace: asks for image and slice if nothing says which,
/// shows what is waited for, and greets who gets a shell. Whatever happens, the terminal is left as it was.
///
/// # Errors
/// Why it ended. The terminal has been told.
pub async fn enter_with_terminal(
    terminal: &mut dyn Terminal,
    workspaces: &Workspaces,
    user: &UserRecord,
    wish: Wish,
) -> Result<Entered, LoginEnd> {
    let greeted = terminal.begins_shell();
    let mut console = Console::new(terminal);
    let result = enter(&mut console, workspaces, user, wish).await;
    match &result {
        Ok(_) | Err(LoginEnd::HungUp | LoginEnd::GaveUp | LoginEnd::NobodyChose) => {}
        Err(LoginEnd::Failed(error)) => console.print(&text::error(error)).await?,
    }
    let attached = result?;
    console.erase().await?;
    if greeted {
        greet(&mut console, workspaces, user, &attached).await?;
    }
    Ok(Entered { attached, typed: console.take_ahead() })
}

impl From<io::Error> for LoginEnd {
    fn from(_: io::Error) -> Self {
        Self::HungUp
    }
}

impl From<WorkspaceError> for LoginEnd {
    fn from(error: WorkspaceError) -> Self {
        Self::Failed(error)
    }
}

async fn enter(
    console: &mut Console<'_>,
    workspaces: &Workspaces,
    user: &UserRecord,
    mut wish: Wish,
) -> Result<Attached, LoginEnd> {
    let preset = workspaces.preset(user, &wish).await?;
    let mut keys = Keys::default();
    let image = match preset.image {
        Some(image) => image,
        None => {
            let image = choose_image(console, &mut keys, workspaces, user).await?;
            wish.image = Some(image.clone());
            image
        }
    };
    if preset.need.is_none() {
        wish.need = Some(choose_slice(console, &mut keys, workspaces, user, &image).await?);
    }
    let entering = workspaces.enter(user, wish).await?;
    wait(console, workspaces, entering).await
}

// ── Choosing ──

async fn choose_image(
    console: &mut Console<'_>,
    keys: &mut Keys,
    workspaces: &Workspaces,
    user: &UserRecord,
) -> Result<String, LoginEnd> {
    let mut images = workspaces.images(user).await?;
    let selected = images.iter().position(|image| image.available).unwrap_or(0);
    match images.as_slice() {
        [] => Err(LoginEnd::Failed(WorkspaceError::NoImage)),
        [only] => Ok(only.name.clone()),
        _ => {
            let menu = Menu::new(text::WHICH_IMAGE, images.iter().map(text::image_item).collect(), selected);
            let at = choose(console, keys, menu).await?;
            Ok(images.swap_remove(at.min(images.len() - 1)).name)
        }
    }
}

async fn choose_slice(
    console: &mut Console<'_>,
    keys: &mut Keys,
    workspaces: &Workspaces,
    user: &UserRecord,
    image: &str,
) -> Result<Need, LoginEnd> {
    let least = workspaces.image_needs(user, image).await?;
    let most = user.quota.gpu_memory_mib.unwrap_or(u64::MAX);
    let offers = match user.quota.slices {
        Some(0) => Vec::new(),
        _ => offers(&workspaces.gpus().await?.gpus),
    };
    let mut choices: Vec<(Need, (String, String))> = offers
        .into_iter()
        .filter(|offer| (least..=most).contains(&offer.memory_mib))
        .map(|offer| (offer.need(), text::slice_item(&offer.profile, offer.memory_mib, offer.free, offer.most)))
        .collect();
    if least == 0 {
        choices.push((Need::Cpu, text::no_slice_item()));
    }
    let (mut needs, items): (Vec<_>, Vec<_>) = choices.into_iter().unzip();
    match needs.len() {
        0 => Err(LoginEnd::Failed(WorkspaceError::NoNeed)),
        1 => Ok(needs.swap_remove(0)),
        count => {
            let at = choose(console, keys, Menu::new(text::WHICH_SLICE, items, 0)).await?;
            Ok(needs.swap_remove(at.min(count - 1)))
        }
    }
}

/// What can be asked of all GPUs together.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Offer {
    profile: String,
    memory_mib: u64,
    free: u32,
    most: u32,
}

impl Offer {
    fn need(&self) -> Need {
        match self.profile.as_str() {
            "gpu" => Need::Gpu,
            profile => Need::Profile(profile.to_owned()),
        }
    }
}

/// The profiles of all GPUs, the smallest first.
fn offers(gpus: &[Gpu]) -> Vec<Offer> {
    let mut offers: Vec<Offer> = Vec::new();
    for room in gpus.iter().flat_map(|gpu| &gpu.profiles) {
        match offers.iter_mut().find(|offer| offer.profile == room.profile) {
            Some(offer) => {
                offer.free = offer.free.saturating_add(room.free);
                offer.most = offer.most.saturating_add(room.most);
                offer.memory_mib = offer.memory_mib.min(room.memory_mib);
            }
            None => offers.push(Offer {
                profile: room.profile.clone(),
                memory_mib: room.memory_mib,
                free: room.free,
                most: room.most,
            }),
        }
    }
    offers.sort_by(|a, b| (a.memory_mib, &a.profile).cmp(&(b.memory_mib, &b.profile)));
    offers
}

/// Shows a menu until something is chosen.
async fn choose(console: &mut Console<'_>, keys: &mut Keys, mut menu: Menu) -> Result<usize, LoginEnd> {
    show(console, &menu).await?;
    loop {
        while let Some(byte) = console.next_byte() {
            let Some(key) = keys.read(byte) else { continue };
            match menu.press(key) {
                Pressed::GaveUp => return give_up(console).await,
                Pressed::Chosen(at) => {
                    if !console.moves() {
                        console.write("\r\n").await?;
                    }
                    console.print(&text::chosen(menu.title(), menu.name(at))).await?;
                    return Ok(at);
                }
                Pressed::On if console.moves() => {}
                Pressed::On => console.write(&echo(byte)).await?,
            }
        }
        if console.interrupted() {
            return give_up(console).await;
        }
        if console.is_silent() {
            leave(console, text::NOBODY_CHOSE).await?;
            return Err(LoginEnd::NobodyChose);
        }
        if console.moves() {
            console.draw(&menu.lines(console.columns(), console.rows())).await?;
        }
        match console.event().await {
            Event::Typed => {}
            Event::Resized => console.resized().await?,
            Event::HungUp => return Err(LoginEnd::HungUp),
        }
    }
}

async fn give_up<T>(console: &mut Console<'_>) -> Result<T, LoginEnd> {
    leave(console, text::GAVE_UP).await?;
    Err(LoginEnd::GaveUp)
}

/// A last line in the place of the menu, or below its prompt where that stays.
async fn leave(console: &mut Console<'_>, line: &str) -> io::Result<()> {
    if !console.moves() {
        console.write("\r\n").await?;
    }
    console.print(line).await
}

/// On a terminal that cannot redraw, the menu is shown once.
async fn show(console: &mut Console<'_>, menu: &Menu) -> Result<(), LoginEnd> {
    if !console.moves() {
        for line in menu.lines(console.columns(), usize::MAX) {
            console.print(&line).await?;
        }
        console.write(&text::number_prompt(menu.len())).await?;
    }
    Ok(())
}

fn echo(byte: u8) -> String {
    if byte.is_ascii_digit() { char::from(byte).to_string() } else { String::new() }
}

// ── Waiting ──

async fn wait(
    console: &mut Console<'_>,
    workspaces: &Workspaces,
    mut entering: Entering,
) -> Result<Attached, LoginEnd> {
    let clock = workspaces.clock();
    let began = clock.now();
    let mut doing = Doing::Nothing;
    let mut said = String::new();
    loop {
        if console.interrupted() {
            drop(entering);
            console.print(text::GAVE_PLACE_BACK).await?;
            return Err(LoginEnd::GaveUp);
        }
        tell(console, clock, &doing, began, &mut said).await?;
        let tick = later(clock.now(), TICK);
        tokio::select! {
            progress = entering.next() => match progress? {
                Progress::Ready(attached) => return Ok(attached),
                Progress::Stopping => doing = Doing::Stopping,
                Progress::Pulling { done, total } => doing = Doing::Pulling(done, total),
                Progress::Starting => doing = Doing::Starting,
                Progress::Waiting(wait) => doing = Doing::Waiting(Box::new(wait)),
            },
            event = console.event() => match event {
                Event::Typed => {}
                Event::Resized => console.resized().await?,
                Event::HungUp => return Err(LoginEnd::HungUp),
            },
            () = clock.until(tick), if doing.ticks() && console.moves() => {}
        }
    }
}

/// Says what is going on: redrawn in place, or, where that cannot be, whenever it has changed.
async fn tell(
    console: &mut Console<'_>,
    clock: &dyn Clock,
    doing: &Doing,
    began: jiff::Timestamp,
    said: &mut String,
) -> io::Result<()> {
    if !console.moves() {
        let plain = doing.plain();
        if !plain.is_empty() && plain != *said {
            console.print(&plain).await?;
            *said = plain;
        }
        return Ok(());
    }
    // Not for what is over in a moment, as when a slice has only to be made.
    if let Doing::Waiting(wait) = doing
        && said.is_empty()
        && clock.now() >= later(began, TICK)
    {
        *said = text::wait_detail(wait);
        if !said.is_empty() {
            console.print(said).await?;
        }
    }
    match doing.line(began, clock.now(), console.columns()) {
        line if line.is_empty() => console.erase().await,
        line => console.draw(&[line]).await,
    }
}

// ── Greeting ──

async fn greet(
    console: &mut Console<'_>,
    workspaces: &Workspaces,
    user: &UserRecord,
    attached: &Attached,
) -> io::Result<()> {
    let asked = tokio::time::timeout(GREETING_PATIENCE, workspaces.leases_and_waits()).await;
    let situation = match asked {
        Ok(Ok((leases, waits))) => Some(Situation::new(&user.quota, &user.name, &leases, waits.len())),
        Ok(Err(_)) | Err(_) => None,
    };
    let (idle, columns) = (workspaces.idle_minutes(), console.columns());
    let lines = greeting(attached.workspace(), attached.last_end(), situation.as_ref(), idle, columns);
    for line in lines {
        console.print(&line).await?;
    }
    Ok(())
}
