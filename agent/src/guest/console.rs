//! What a guest says on its serial console, and what that tells.
//!
//! ```text
//! bytes ─► control sequences out ─► lines ─► the last 64 KiB kept
//!                                     └─► a sign of life, or the end of the boot; what was seen first stands, but an end follows a life
//! ```
//! Owns: the words by which a boot is known to have come to an end, good or bad. Never: keeps more than it says, whatever a guest sends.
//! A crash here costs nothing.

use std::time::{Duration, Instant};

/// Bytes of text that are kept.
pub const KEPT: usize = 64 << 10;
/// Bytes of text that a job shows.
pub const TAIL: usize = 4 << 10;
/// Longest line; a longer one is several.
const LINE: usize = 4 << 10;
/// How long a prompt must stand with nothing behind it: it may be the first half of a sentence.
const QUIET: Duration = Duration::from_millis(300);

/// What a line tells of a boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Word {
    /// It is up: by what that is known.
    Alive(String),
    /// It will not come up: why.
    Dead(String),
}

/// Where the control sequence is that is being left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Escape {
    None,
    /// Behind ESC.
    Begun,
    /// Behind ESC and one of `()*+#%`: one byte follows.
    Charset,
    /// Behind ESC [: parameters until a letter.
    Control,
    /// Behind ESC ] and the like: text until BEL or ESC \.
    Text,
    /// The ESC of that end.
    TextEnd,
}

/// One console.
pub struct Console {
    sign: Option<String>,
    escape: Escape,
    /// Whole lines.
    text: Vec<u8>,
    line: Vec<u8>,
    /// The last byte was a return: the end of line behind it is the same one.
    returned: bool,
    heard_at: Instant,
    alive: Option<String>,
    dead: Option<String>,
    /// What `dead` says is the beginning of a line that goes on.
    goes_on: bool,
}

impl Console {
    /// One on which `sign`, where there is one, is the only sign of life.
    pub fn new(sign: Option<&str>) -> Self {
        Self {
            sign: sign.map(str::to_owned),
            escape: Escape::None,
            text: Vec::new(),
            line: Vec::new(),
            returned: false,
            heard_at: Instant::now(),
            alive: None,
            dead: None,
            goes_on: false,
        }
    }

    /// The guest has said this.
    pub fn hear(&mut self, bytes: &[u8]) {
        self.heard_at = Instant::now();
        for byte in bytes {
            self.take(*byte);
        }
        // A prompt for whoever stands in a shell has no end of line.
        let line = String::from_utf8_lossy(&self.line).into_owned();
        self.note(of_line(&line, self.sign.as_deref(), false), false);
    }

    fn take(&mut self, byte: u8) {
        self.escape = match (self.escape, byte) {
            (Escape::None, 0x1b) => Escape::Begun,
            (Escape::None, _) => return self.put(byte),
            (Escape::Begun, b'[') => Escape::Control,
            (Escape::Begun, b']' | b'P' | b'X' | b'^' | b'_') => Escape::Text,
            (Escape::Begun, b'(' | b')' | b'*' | b'+' | b'#' | b'%') => Escape::Charset,
            (Escape::Begun | Escape::Charset, _) => Escape::None,
            (Escape::Control, b'H' | b'J' | b'f') => {
                // Somewhere else on the screen: not the same line.
                self.put(b'\n');
                Escape::None
            }
            (Escape::Control, 0x40..=0x7e) => Escape::None,
            (Escape::Control, _) => Escape::Control,
            (Escape::Text, 0x07) | (Escape::TextEnd, b'\\') => Escape::None,
            (Escape::Text | Escape::TextEnd, 0x1b) => Escape::TextEnd,
            (Escape::Text | Escape::TextEnd, _) => Escape::Text,
        };
    }

    fn put(&mut self, byte: u8) {
        let returned = std::mem::replace(&mut self.returned, byte == b'\r');
        match byte {
            // \r\n, and \r\r\n of a guest whose terminal adds its own.
            b'\n' | b'\r' if returned => {}
            b'\n' | b'\r' => self.end_line(),
            0x08 => drop(self.line.pop()),
            b'\t' | 0x20..=0x7e | 0x80.. => {
                self.line.push(byte);
                if self.line.len() >= LINE {
                    self.end_line();
                }
            }
            _ => {}
        }
    }

    fn end_line(&mut self) {
        // More than one empty line tells no more than one.
        if self.line.is_empty() && (self.text.is_empty() || self.text.ends_with(b"\n\n")) {
            return;
        }
        let line = std::mem::take(&mut self.line);
        self.note(of_line(&String::from_utf8_lossy(&line), self.sign.as_deref(), true), true);
        self.text.extend_from_slice(&line);
        self.text.push(b'\n');
        if self.text.len() > 2 * KEPT {
            self.text.drain(..self.text.len() - KEPT);
        }
    }

    fn note(&mut self, word: Option<Word>, is_whole: bool) {
        match word {
            Some(Word::Alive(sign)) if self.alive.is_none() && self.dead.is_none() => self.alive = Some(sign),
            Some(Word::Dead(cause)) if self.dead.is_none() || self.goes_on => {
                self.dead = Some(cause);
                self.goes_on = !is_whole;
            }
            _ => {}
        }
        self.goes_on &= !is_whole;
    }

    /// The sign of life that was seen. A prompt counts when nothing came behind it for a moment.
    pub fn alive(&mut self) -> Option<&str> {
        if self.alive.is_none() && self.dead.is_none() && self.sign.is_none() && self.heard_at.elapsed() >= QUIET {
            let line = String::from_utf8_lossy(&self.line).into_owned();
            self.alive = is_login_prompt(&line).then(|| login(&line));
        }
        self.alive.as_deref()
    }

    /// Why it will not come up.
    pub fn dead(&self) -> Option<&str> {
        self.dead.as_deref()
    }

    /// The last text, at most so many bytes.
    pub fn last(&self, most: usize) -> String {
        let all = [self.text.as_slice(), self.line.as_slice()].concat();
        let text = String::from_utf8_lossy(&all[all.len() - all.len().min(most)..]).into_owned();
        // What was cut in the middle of a letter is no letter.
        text.trim_start_matches(char::REPLACEMENT_CHARACTER).to_owned()
    }
}

fn login(line: &str) -> String {
    format!("login prompt: {}", line.trim())
}

/// Words that end a boot wherever they stand in a line, and what they mean.
const DEADLY: &[(&str, &str)] = &[
    ("Kernel panic - not syncing", "the guest's kernel panicked"),
    ("Gave up waiting for root", "the guest did not find its root file system and stopped in its initramfs"),
    ("You are in emergency mode", "the guest stopped in emergency mode"),
    ("Entering emergency mode", "the guest stopped in emergency mode"),
    ("Reached target emergency.target", "the guest stopped in emergency mode"),
    ("Reached target Emergency Mode", "the guest stopped in emergency mode"),
    ("the root account is locked", "the guest stopped in emergency mode"),
    ("initramfs emergency recovery shell launched", "the guest did not find its root file system and stopped in its initramfs"),
    ("You are in rescue mode", "the guest stopped in rescue mode"),
];

/// Words that do so where a line begins with them.
const DEADLY_FIRST: &[(&str, &str)] = &[
    ("(initramfs)", "the guest stopped in its initramfs"),
    ("dracut:/#", "the guest stopped in its initramfs"),
    ("mountroot>", "the guest did not find its root file system"),
    ("panic: ", "the guest's kernel panicked"),
    ("No bootable device", "the firmware found nothing to boot"),
    ("BdsDxe: No bootable option or device was found", "the firmware found nothing to boot"),
    ("Missing operating system", "the firmware found nothing to boot"),
    ("Operating System not found", "the firmware found nothing to boot"),
    ("An operating system wasn't found", "the firmware found nothing to boot"),
    ("Error loading operating system", "the firmware found nothing to boot"),
    ("Invalid partition table", "the firmware found nothing to boot"),
    ("BOOTMGR is missing", "the boot loader did not find its system"),
    ("NTLDR is missing", "the boot loader did not find its system"),
    ("Could not find kernel image", "the boot loader did not find its system"),
    ("Entering rescue mode", "GRUB stopped in its rescue shell"),
    ("grub rescue>", "GRUB stopped in its rescue shell"),
    ("grub>", "GRUB stopped in its shell: it found nothing to start"),
];

/// What a line tells; `is_whole`: its end has come.
pub fn of_line(line: &str, sign: Option<&str>, is_whole: bool) -> Option<Word> {
    let line = line.trim();
    if let Some(sign) = sign.filter(|sign| line.contains(sign)) {
        return Some(Word::Alive(sign.to_owned()));
    }
    let deadly = DEADLY.iter().find(|(word, _)| line.contains(word));
    if let Some((_, cause)) = deadly.or_else(|| DEADLY_FIRST.iter().find(|(word, _)| line.starts_with(word))) {
        let said: String = line.chars().take(200).collect();
        return Some(Word::Dead(format!("{cause}: {said}")));
    }
    // The kernel may speak behind a prompt at any time.
    let prompt = without_kernel(line).filter(|prompt| is_whole && sign.is_none() && is_login_prompt(prompt));
    prompt.map(|prompt| Word::Alive(login(prompt)))
}

/// What stands before a kernel's message in the same line: `[   12.345678] …`.
fn without_kernel(line: &str) -> Option<&str> {
    let (before, message) = line.split_once('[')?;
    let (time, _) = message.split_once(']')?;
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    time.trim_start().split_once('.').is_some_and(|(seconds, rest)| is_number(seconds) && is_number(rest)).then_some(before)
}

/// Whether somebody is asked for his name: `login:`, with nothing or a host's name before it and nothing behind.
fn is_login_prompt(line: &str) -> bool {
    let mut words = line.split_whitespace();
    match (words.next(), words.next(), words.next()) {
        (Some("login:"), None, None) => true,
        (Some(host), Some("login:"), None) => {
            let letters = host.chars().all(|c| c.is_alphanumeric() || matches!(c, '.' | '-' | '_'));
            letters && !["last", "failed", "invalid", "bad", "root", "user", "new"].contains(&host.to_lowercase().as_str())
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(text: &str, sign: Option<&str>) -> Option<Word> {
        let mut console = Console::new(sign);
        // As it comes: in pieces.
        for piece in text.as_bytes().chunks(7) {
            console.hear(piece);
        }
        console.heard_at = Instant::now().checked_sub(QUIET).unwrap_or_else(Instant::now);
        let alive = console.alive().map(str::to_owned);
        console.dead().map(|cause| Word::Dead(cause.to_owned())).or(alive.map(Word::Alive))
    }

    #[test]
    fn a_sign_of_life_is_a_prompt_and_no_sentence() {
        for text in [
            "\r\nDebian GNU/Linux 12 migguest ttyS0\r\n\r\nmigguest login: ",
            "\x1b[H\x1b[JUbuntu 22.04.3 LTS web01.example.org ttyS0\r\n\r\nweb01.example.org login: ",
            "FreeBSD/amd64 (bsd) (ttyu0)\r\n\r\nlogin: ",
            "\r\nmigguest login: [   41.204410] random: crng init done\r\n",
            "\x1b[0m\x1b[?2004hlocalhost login: ",
        ] {
            assert!(matches!(word(text, None), Some(Word::Alive(sign)) if sign.starts_with("login prompt: ")), "{text:?}");
        }
        for text in [
            "[  OK  ] Reached target Login Prompts.\r\n",
            "systemd-logind[312]: New seat seat0.\r\n",
            "for the first login: use the password of the installer\r\n",
            "Waiting for the first login:\r\n",
            "Last login: Thu Nov 26 10:00:00 UTC 2026 on ttyS0\r\n",
            "Last login:",
            "Failed login: ",
            "sshd[1]: login: ",
            "migguest login: root\r\nroot@migguest:~# ",
            "TINYGUEST-LOGIN ready\r\n",
            "",
        ] {
            assert_eq!(word(text, None), None, "{text:?}");
        }
        // Whoever names a sign means it.
        assert_eq!(word("tiny login: ", Some("ready")), None);
        assert_eq!(word("TINYGUEST-LOGIN rea\x1b[1mdy", Some("LOGIN ready")), Some(Word::Alive("LOGIN ready".into())));
    }

    #[test]
    fn a_boot_that_ends_badly_says_why() {
        for (text, cause) in [
            // As they were seen here, or as their sources print them.
            (
                "\x1bc\x1b[?7l\x1b[2J\x1b[0mSeaBIOS (version 1.16.2-debian-1.16.2-1)\r\nBooting from Hard Disk...\r\nBoot failed: not a bootable disk\r\n\r\nNo bootable device.\r\n",
                "the firmware found nothing to boot: No bootable device.",
            ),
            (
                "Gave up waiting for root file system device.  Common problems:\r\n - Boot args (cat /proc/cmdline)\r\n",
                "did not find its root file system",
            ),
            (
                "ALERT!  UUID=6d69 does not exist.  Dropping to a shell!\r\n\r\n\r\nBusyBox v1.35.0\r\n\r\n(initramfs) ",
                "stopped in its initramfs",
            ),
            (
                "[    1.9] Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)\r\n",
                "panicked: [    1.9] Kernel panic - not syncing: VFS: Unable",
            ),
            ("You are in emergency mode. After logging in, type \"journalctl -xb\"\r\n", "emergency mode"),
            ("Cannot open access to console, the root account is locked.\r\n", "emergency mode"),
            (
                "Generating \"/run/initramfs/rdsosreport.txt\"\r\n\r\n\r\nEntering emergency mode. Exit the shell to continue.\r\n",
                "emergency mode",
            ),
            ("error: no such device: 6d69.\r\nEntering rescue mode...\r\ngrub rescue> ", "rescue shell"),
            ("GNU GRUB  version 2.06\r\n\r\ngrub> ", "GRUB stopped in its shell"),
            ("BdsDxe: No bootable option or device was found.\r\n", "nothing to boot"),
        ] {
            assert!(matches!(word(text, None), Some(Word::Dead(why)) if why.contains(cause)), "{text:?}: {:?}", word(text, None));
        }
        // An end behind a life counts; a life behind an end does not.
        assert!(matches!(word("a login: \r\nx\r\nKernel panic - not syncing: x\r\n", Some("a login:")), Some(Word::Dead(_))));
        assert!(matches!(word("(initramfs) \r\nready\r\n", Some("ready")), Some(Word::Dead(_))));
        // The words inside a sentence end nothing.
        assert_eq!(word("multipathd: No bootable device was configured? grub> panic: x\r\n [1] the (initramfs) was left\r\n", None), None);
    }

    #[test]
    fn a_flood_costs_what_is_kept() {
        let mut console = Console::new(None);
        for n in 0..200_000u32 {
            console.hear(format!("line {n} of a guest that does not stop\r\n").as_bytes());
        }
        console.hear(&vec![b'x'; 1 << 20]);
        console.hear(&vec![0x1b; 1 << 20]);
        assert!(console.text.capacity() + console.line.capacity() <= 6 * KEPT, "{}", console.text.capacity());
        assert!(console.last(TAIL).len() <= TAIL && console.last(KEPT).len() <= KEPT);
        // Cut in the middle of a letter.
        let mut console = Console::new(None);
        console.hear("ääää\n".as_bytes());
        assert_eq!(console.last(4), "ä\n");
    }
}
