//! IP addresses as the kernel's contexts give them: words in network order, one family at a time.
//!
//! In here an address is four words, not sixteen octets: the compiler would take octets apart one by one. It becomes a
//! map's key by its memory, which is the same.

use core::arch::asm;

use heddle_common::Address;

pub const AF_INET: u32 = 2;
pub const AF_INET6: u32 = 10;
pub const IPPROTO_TCP: u32 = 6;
pub const IPPROTO_UDP: u32 = 17;
/// Linux 5.6: an MPTCP socket; the connections below it are TCP.
pub const IPPROTO_MPTCP: u32 = 262;

/// An address, in memory the same as [`Address`].
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Ip([u32; 4]);

impl Ip {
    /// `::`, no address.
    pub const UNSPECIFIED: Self = Self([0; 4]);

    /// From the word of an IPv4 address as a context gives it: the v4-mapped IPv6 address.
    #[inline(always)]
    pub const fn v4(word: u32) -> Self {
        Self([0, 0, 0xffff_u32.to_be(), word])
    }

    /// From the words of an IPv6 address as a context gives them.
    #[inline(always)]
    pub const fn v6(words: [u32; 4]) -> Self {
        Self(words)
    }

    /// From a map's key.
    #[inline(always)]
    pub const fn from_address(address: Address) -> Self {
        // SAFETY: both are sixteen octets of integers (asserted in heddle_common); any bit pattern is valid.
        Self(unsafe { core::mem::transmute::<Address, [u32; 4]>(address) })
    }

    /// From where an address lies, on a word's boundary.
    ///
    /// # Safety
    /// The place is live and aligned to a word.
    #[inline(always)]
    pub unsafe fn from_place(place: *const Address) -> Self {
        // SAFETY: the caller's promise; word by word, as the compiler would take octets.
        unsafe {
            let words = place.cast::<u32>();
            Self([
                words.read_volatile(),
                words.add(1).read_volatile(),
                words.add(2).read_volatile(),
                words.add(3).read_volatile(),
            ])
        }
    }

    /// The words of an IPv6 context; of an IPv4 one the last is the address.
    #[inline(always)]
    pub const fn words(self) -> [u32; 4] {
        self.0
    }

    /// Whether it is no address: `0.0.0.0` (v4-mapped) or `::`.
    #[inline(always)]
    pub const fn is_unspecified(self) -> bool {
        let [a, b, c, d] = self.0;
        a == 0 && b == 0 && d == 0 && (c == 0 || c == 0xffff_u32.to_be())
    }

    /// As a map's key.
    #[inline(always)]
    pub const fn address(self) -> Address {
        // SAFETY: both are sixteen octets of integers (asserted in heddle_common); any bit pattern is valid.
        unsafe { core::mem::transmute::<[u32; 4], Address>(self.0) }
    }

    /// As two numbers, to cross a function call.
    #[inline(always)]
    pub const fn halves(self) -> [u64; 2] {
        // SAFETY: both are sixteen octets of integers; any bit pattern is valid.
        unsafe { core::mem::transmute::<[u32; 4], [u64; 2]>(self.0) }
    }

    /// From [`Ip::halves`].
    #[inline(always)]
    pub const fn from_halves(halves: [u64; 2]) -> Self {
        // SAFETY: as above.
        Self(unsafe { core::mem::transmute::<[u64; 2], [u32; 4]>(halves) })
    }

    /// Whether the address never leaves the pod: `127.0.0.0/8` (also v4-mapped) or `::1`.
    #[inline(always)]
    pub const fn is_loopback(self) -> bool {
        let [a, b, c, d] = self.0;
        if a != 0 || b != 0 {
            return false;
        }
        if c == 0xffff_u32.to_be() { d.to_be() >> 24 == 127 } else { c == 0 && d == 1_u32.to_be() }
    }
}

/// Reads the word at `OFFSET` of a context. The verifier takes context accesses of a fixed offset and of the field's
/// own width only; the compiler, left to itself, merges neighbours and adds the offset to the pointer.
///
/// # Safety
/// `context` is the pointer that the kernel gave to the running program, and a word field lies at `OFFSET`.
#[inline(always)]
pub unsafe fn load<const OFFSET: usize, T>(context: *const T) -> u32 {
    let value: u64;
    // SAFETY: the caller's promise.
    unsafe {
        asm!(
            "{value} = *(u32 *)({context} + {offset})",
            value = lateout(reg) value,
            context = in(reg) context,
            offset = const OFFSET,
            options(readonly, preserves_flags, nostack),
        );
    }
    value as u32
}

/// Reads the double word at `OFFSET` of a context, as [`load`] a word.
///
/// # Safety
/// As [`load`], of a field of eight bytes.
#[inline(always)]
pub unsafe fn load_u64<const OFFSET: usize, T>(context: *const T) -> u64 {
    let value: u64;
    // SAFETY: the caller's promise.
    unsafe {
        asm!(
            "{value} = *(u64 *)({context} + {offset})",
            value = lateout(reg) value,
            context = in(reg) context,
            offset = const OFFSET,
            options(readonly, preserves_flags, nostack),
        );
    }
    value
}

/// Writes the word at `OFFSET` of a context, as [`load`] reads it.
///
/// # Safety
/// As [`load`], of a field that the program may write.
#[inline(always)]
pub unsafe fn store<const OFFSET: usize, T>(context: *mut T, value: u32) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!(
            "*(u32 *)({context} + {offset}) = {value}",
            value = in(reg) u64::from(value),
            context = in(reg) context,
            offset = const OFFSET,
            options(preserves_flags, nostack),
        );
    }
}

/// Reads the four words at `OFFSET` of a context.
///
/// # Safety
/// As [`load`], for four neighbouring fields.
macro_rules! words {
    ($context:expr, $type:ty, $field:ident) => {
        [
            $crate::address::load::<{ core::mem::offset_of!($type, $field) }, _>($context),
            $crate::address::load::<{ core::mem::offset_of!($type, $field) + 4 }, _>($context),
            $crate::address::load::<{ core::mem::offset_of!($type, $field) + 8 }, _>($context),
            $crate::address::load::<{ core::mem::offset_of!($type, $field) + 12 }, _>($context),
        ]
    };
}
/// Reads one word field of a context.
///
/// # Safety
/// As [`load`].
macro_rules! word {
    ($context:expr, $type:ty, $field:ident) => {
        $crate::address::load::<{ core::mem::offset_of!($type, $field) }, _>($context)
    };
}
/// Writes one word field of a context.
///
/// # Safety
/// As [`store`].
macro_rules! set_word {
    ($context:expr, $type:ty, $field:ident, $value:expr) => {
        $crate::address::store::<{ core::mem::offset_of!($type, $field) }, _>($context, $value)
    };
}
/// Writes the four words of a field of a context.
///
/// # Safety
/// As [`store`].
macro_rules! set_words {
    ($context:expr, $type:ty, $field:ident, $value:expr) => {{
        let [a, b, c, d] = $value;
        $crate::address::store::<{ core::mem::offset_of!($type, $field) }, _>($context, a);
        $crate::address::store::<{ core::mem::offset_of!($type, $field) + 4 }, _>($context, b);
        $crate::address::store::<{ core::mem::offset_of!($type, $field) + 8 }, _>($context, c);
        $crate::address::store::<{ core::mem::offset_of!($type, $field) + 12 }, _>($context, d);
    }};
}
pub(crate) use {set_word, set_words, word, words};
