# The script guest: executes a table of operations in long mode.
#
# On entry RDI is the address of the table. Each operation is eight words: number, a, b, c, result, and three spare.
# It needs no stack and no fixed address. An operation that does not exist is an undefined instruction.
#
#   0 halt
#   1 fill     b words from a on become c
#   2 check    result: how many of b words from a on are not c
#   3 read     result: the word at a
#   4 write    the word at a becomes c
#   5 vmcall   KVM_HC_MAP_GPA_RANGE(a, b, c); result: RAX
#   6 vmmcall  the same on AMD
#   7 doorbell the same by port
#   8 out      c to port a, b bytes
#   9 in       result: from port a, b bytes
#  10 loop     to operation a, c times in all; b counts
#  11 barrier  b grows by c, the word at a by one; wait until that reaches b
#  12 add      the word at a grows by c, atomically; result: what it was
#  13 touch    read a byte at a and every c bytes after, b times
#  14 unless   to operation a, unless the word at b is c
#  15 count    result grows by one
#  16 dirty    write a byte at a and every c bytes after, b times

    .code64
    .pushsection .rodata.pagegate_guests, "a", @progbits
    .balign 16
    .globl pagegate_guest_script
pagegate_guest_script:
    mov     r12, rdi
    mov     r13, rdi
    cld
20: mov     rax, [r13]
    cmp     rax, 16
    ja      91f
    lea     rdx, [rip + 90f]
    movsxd  rax, dword ptr [rdx + rax * 4]
    add     rax, rdx
    mov     r8, [r13 + 8]
    mov     r9, [r13 + 16]
    mov     r10, [r13 + 24]
    jmp     rax

21: mov     [r13 + 32], rax
22: add     r13, 64
    jmp     20b
23: shl     r8, 6                           # to operation r8
    lea     r13, [r12 + r8]
    jmp     20b

30: hlt
    jmp     30b

31: mov     rdi, r8
    mov     rcx, r9
    mov     rax, r10
    rep stosq
    jmp     22b

32: xor     eax, eax
70: test    r9, r9
    jz      21b
    xor     edx, edx
    cmp     [r8], r10
    setne   dl
    add     rax, rdx
    add     r8, 8
    dec     r9
    jmp     70b

33: mov     rax, [r8]
    jmp     21b

34: mov     [r8], r10
    jmp     22b

35: lea     r11, [rip + 50f]
    jmp     38f
36: lea     r11, [rip + 51f]
    jmp     38f
37: lea     r11, [rip + 52f]
38: mov     eax, 12
    mov     rbx, r8
    mov     rcx, r9
    mov     rdx, r10
    jmp     r11
50: vmcall
    jmp     21b
51: vmmcall
    jmp     21b
52: out     0xe6, al
    jmp     21b

40: mov     edx, r8d
    mov     eax, r10d
    cmp     r9, 2
    ja      43f
    je      42f
    out     dx, al
    jmp     22b
42: out     dx, ax
    jmp     22b
43: out     dx, eax
    jmp     22b

44: mov     edx, r8d
    xor     eax, eax
    cmp     r9, 2
    ja      46f
    je      45f
    in      al, dx
    jmp     21b
45: in      ax, dx
    jmp     21b
46: in      eax, dx
    jmp     21b

60: dec     qword ptr [r13 + 16]
    jnz     23b
    mov     [r13 + 16], r10
    jmp     22b

61: add     r9, r10
    mov     [r13 + 16], r9
    lock inc qword ptr [r8]
62: cmp     [r8], r9
    jae     22b
    pause
    jmp     62b

63: mov     rax, r10
    lock xadd [r8], rax
    jmp     21b

64: test    r9, r9
    jz      22b
    mov     al, [r8]
    add     r8, r10
    dec     r9
    jmp     64b

65: cmp     [r9], r10
    jne     23b
    jmp     22b

66: inc     qword ptr [r13 + 32]
    jmp     22b

67: test    r9, r9
    jz      22b
    mov     [r8], r9b
    add     r8, r10
    dec     r9
    jmp     67b

91: ud2

    .balign 4
90: .long   30b - 90b, 31b - 90b, 32b - 90b, 33b - 90b, 34b - 90b, 35b - 90b, 36b - 90b, 37b - 90b
    .long   40b - 90b, 44b - 90b, 60b - 90b, 61b - 90b, 63b - 90b, 64b - 90b, 65b - 90b, 66b - 90b
    .long   67b - 90b
    .globl pagegate_guest_script_end
pagegate_guest_script_end:
    .popsection
