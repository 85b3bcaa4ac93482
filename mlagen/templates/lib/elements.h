// Element types are storage only; arithmetic is fp32.  A 32-bit word holds two 16-bit or four 8-bit elements, the first one lowest.

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };
struct fp8_e4m3fn { uint8_t bits; };    // OCP: bias 7, largest 448
struct fp8_e4m3fnuz { uint8_t bits; };  // bias 8, largest 240, no negative zero, NaN is 0x80
